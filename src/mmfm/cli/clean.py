"""``mmfm clean``: remove the state of unfinished work that no target uses any more, or the latent caches."""

import argparse
from pathlib import Path

from mmfm.infra import stage_state
from mmfm.workflow import garbage, last_run

DESCRIPTION = """\
List or remove state directories (state-.../ beside the results: checkpoints, EM iterations, unfinished shards) that no
target uses any more: with the configuration of the last run, their stage would not resume from them, because its
version, its keys or its inputs have changed. Keys that a target's name can set (seed, model, k, t) do not count.

  mmfm clean                        list both, with sizes and reasons; remove nothing
  mmfm clean --unused --dry-run     list unused state
  mmfm clean --unused               remove them
  mmfm clean --latents              remove the latent caches in latents.folder of the last run

Latent caches are listed, but stay without --latents; their images are encoded again when they are needed. Nothing else
is ever removed: no results, logs or downloaded files. What a running stage writes is kept, and so is state where no run
has recorded its configuration (configuration.json)."""


def main(arguments: list[str]) -> int:
    """List unused state directories and latent caches and, unless it is a dry run, remove what is asked for."""
    parser = argparse.ArgumentParser(
        prog="mmfm clean", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--unused", action="store_true", help="select unused state")
    parser.add_argument("--latents", action="store_true", help="select latent caches")
    parser.add_argument("--dry-run", action="store_true", help="list, but do not remove")
    parser.add_argument(
        "results", type=Path, nargs="?", default=Path("results"), help="folder of the results (default: results)"
    )
    options = parser.parse_args(arguments)
    everything = not (options.unused or options.latents)
    dry_run = options.dry_run or everything
    if options.unused or everything:
        _clean_states(options.results, dry_run)
    _clean_caches(options.results, options.latents or everything, dry_run)
    if everything:
        print("nothing was removed; --unused removes the state, --latents the latent caches")
    return 0


def _clean_states(results: Path, dry_run: bool) -> None:
    kept = removed = 0
    for state in garbage.find(results):
        if not state.reason:
            kept += state.size
            continue
        if not dry_run and not stage_state.remove_idle_state(state.path):
            kept += state.size
            print(f"in use, kept:   {state.path}")
            continue
        removed += state.size
        print(f"{'would remove' if dry_run else 'removed'}: {state.path} ({_size(state.size)}): {state.reason}")
    verb = "would be freed" if dry_run else "freed"
    print(f"{_size(removed)} {verb}; {_size(kept)} of state kept because it is or may be needed")


def _clean_caches(results: Path, selected: bool, dry_run: bool) -> None:
    used = last_run.configuration(results)
    found = list(garbage.find_caches(Path(used.latents.folder))) if used else []
    for cache in found:
        verb = "kept without --latents"
        if selected:
            verb = "would remove" if dry_run else "removed" if garbage.remove_cache(cache) else "in use, kept"
        print(f"{verb}: {cache.path} ({_size(cache.size)}): latents of {cache.about}")
    if selected and not found:
        print("no latent caches" if used else f"no run has recorded its configuration in '{results}'")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
