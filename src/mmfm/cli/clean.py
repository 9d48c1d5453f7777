"""``mmfm clean``: remove unfinished work that nothing refers to any more."""

import argparse
from pathlib import Path

from mmfm.infra import stage_state
from mmfm.workflow import garbage

DESCRIPTION = """\
List and remove state directories (state-.../ beside the results: checkpoints, EM iterations, unfinished shards) that no
current target refers to. A state stays while a stage, run with the configuration of the last run, would take it up; it
goes if that stage's settings or VERSION are others now, or if one of its inputs was made anew. Settings that a target's
name can carry (seed, model, k, t) keep it, whatever the configuration says.

  mmfm clean --unused --dry-run     list them, with sizes and reasons
  mmfm clean --unused               remove them

Only directories that a stage made as its state are ever removed: no results, logs or fetched files. What a running
stage works in stays, and so does everything where no run has recorded its configuration (configuration.json)."""


def main(arguments: list[str]) -> int:
    """Parse, list, remove."""
    parser = argparse.ArgumentParser(
        prog="mmfm clean", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--unused", action="store_true", required=True, help="state that no current target refers to")
    parser.add_argument("--dry-run", action="store_true", help="list only")
    parser.add_argument("results", type=Path, nargs="?", default=Path("results"), help="folder (default: results)")
    options = parser.parse_args(arguments)
    kept = removed = 0
    for state in garbage.find(options.results):
        if not state.reason:
            kept += state.size
            continue
        if not options.dry_run and not stage_state.remove_idle_state(state.path):
            kept += state.size
            print(f"in use, kept:   {state.path}")
            continue
        removed += state.size
        print(f"{'would remove' if options.dry_run else 'removed'}: {state.path} ({_size(state.size)}): {state.reason}")
    verb = "would be freed" if options.dry_run else "freed"
    print(f"{_size(removed)} {verb}; {_size(kept)} of state that is or may be needed stay")
    return 0


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
