"""``mmfm scale``: estimate what a configuration costs."""

import argparse
from collections.abc import Mapping
from dataclasses import replace

from mmfm import config
from mmfm.config.choices import CARDS
from mmfm.workflow import facts, targets
from mmfm.workflow.costs import Resources, card_of
from mmfm.workflow.outlook import duration
from mmfm.workflow.resources import CACHE_LIMIT, Estimator, for_target, together

DESCRIPTION = """\
Estimate, for every stage of a configuration, the bytes it reads and writes, its disk space, the memory of each process,
its operations and its time. Nothing is run: docs/scale.md says what was counted, measured and assumed.

  mmfm scale --configfile config/imagenet256.yaml --gpus 1 8
  mmfm scale --configfile config/small.yaml mine.yaml --gpus 0
  mmfm scale results/fid/dinov2_mode.k16.t10.txt

With the name of a result, only the stages that it needs are shown, with the modes, model and time points in its name;
with that of the comparison, those of all its results.
The number of images is that of the run's listing. Before there is one, the images in data.root are counted, if that
takes less than a second."""


_COLUMNS = {
    "stage": "*known from*",
    "reads": "*file layouts*",
    "writes": "*file layouts*",
    "disk": "*file layouts*",
    "host / rank": "*rules of thumb*",
    "GPU / rank": "*counts, rules of thumb*",
    "FLOPs": "*counts*",
    "time": "*estimated rates*",
}
"""How the numbers in each column are known; docs/scale.md explains it."""


def main(arguments: list[str]) -> int:
    """Print one table per number of GPUs."""
    parser = argparse.ArgumentParser(
        prog="mmfm scale", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "target", nargs="?", help="name of a result or the comparison, as given to Snakemake (default: all stages)"
    )
    parser.add_argument(
        "--configfile",
        "--config",
        metavar="YAML",
        nargs="+",
        action="extend",
        default=[],
        help="files that override config/config.yaml, as given to Snakemake; later ones override earlier ones",
    )
    parser.add_argument("--encoder", help="entry of `encoders` (default: the target's, or the first)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8], help="numbers of GPUs; 0 for this machine's CPU")
    parser.add_argument("--card", choices=list(CARDS), help="GPU (default: the key `card`)")
    parser.add_argument("--images", type=int, help="number of training images (default: see above)")
    options = parser.parse_args(arguments)
    loaded = config.load(["config/config.yaml", *options.configfile])
    loaded = replace(loaded, card=options.card or loaded.card)
    wanted = targets.parse_compared(options.target, loaded) if options.target else []
    encoder = options.encoder or (wanted[0].encoder if wanted else next(iter(loaded.encoders)))
    loaded.section("encoder", encoder)
    known = facts.gather(loaded, f"results/{loaded.run}" if loaded.run else "results", options.images)
    print(f"{known.n_images:,} training images ({known.origin})\n")
    on_cpu = known if all(options.gpus) else _measured(known)
    for gpus in options.gpus:
        machine = (gpus or 1, gpus > 0, known if gpus else on_cpu)
        needs = [(target, for_target(loaded, target, *machine)) for target in wanted]
        found = together(loaded, needs) if needs else Estimator(loaded, encoder, *machine).stages()
        kind = f"{card_of(loaded.card)[0]} GPU" if gpus else "GPU"
        print(f"{gpus or 'No'} {kind}{'' if gpus == 1 else 's'}\n\n{_table(found)}")
        if gpus:
            print(_micro_batch(Estimator(loaded, encoder, *machine)) + "\n")
    print(_cache(loaded, Estimator(loaded, encoder, 1, False, known)))
    return 0


def _measured(known: facts.Facts) -> facts.Facts:
    """Add what this machine's CPU does, and say it."""
    import torch  # here, because that takes seconds

    from mmfm.workflow import this_cpu

    rates, threads = this_cpu.rates_for(known.image_bytes), torch.get_num_threads()
    cores = f"{threads} core{'s' * (threads != 1)} of this machine"
    print(
        f"Without a GPU, times are for {cores}, at {rates.single:.1e} operations/s, from half a second's measurement.\n"
    )
    return replace(known, rates=rates)


def _micro_batch(estimator: Estimator) -> str:
    """Return a line on what fits into a card's memory."""
    now, fits = estimator.config.train.micro_batch, estimator.largest_micro_batch()
    if not fits:
        return "`train` does not fit; see the keys train.means_device, checkpoint_activations and sharding."
    return f"`train` fits with micro-batches of up to {fits} images (train.micro_batch is {now or 'the whole share'})."


def _cache(loaded: config.Config, estimator: Estimator) -> str:
    """Return a line on the latent cache."""
    size = estimator.cached(2 if loaded.train.flip else 1)
    if size:
        return f"The latent cache in {loaded.latents.folder}/ takes {_bytes(size)}, which the stages' disk includes."
    limit = f"they would take more than {_bytes(CACHE_LIMIT)}"
    reason = limit if loaded.latents.cache == "auto" else "latents.cache is off"
    return f"Latents are not kept: {reason}. Images are encoded at every use."


def _table(found: Mapping[str, Resources]) -> str:
    """Return the resources by stage as a Markdown table."""
    head, origins = (f"| {' | '.join(cells)} |" for cells in (_COLUMNS, _COLUMNS.values()))
    rows = [head, "|---|" + "--:|" * (len(_COLUMNS) - 1), origins]
    for name, taken in found.items():
        sizes = (taken.work.reads, taken.work.writes, taken.disk, taken.host + taken.main, taken.device)
        cells = [f"`{name}`", *map(_bytes, sizes), f"{taken.flops:.1e}", duration(taken.seconds)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _bytes(size: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.0f} kB"
