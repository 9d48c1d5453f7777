"""Trains a small DiT on made-up latents; started by test_parallel.py as several processes, or imported.

python -m torch.distributed.run --nproc-per-node=2 tests/support/tiny_training.py FOLDER
"""

import functools
import json
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from mmfm.infra.distributed import Ranks, process_group
from mmfm.models.dit import DiT, DiTConfig
from mmfm.training import latents
from mmfm.training.options import LoopOptions, OptimizerOptions, Run
from mmfm.training.schedule import ConstantThenLinear
from mmfm.training.trainer import Trainer

STEPS, HALF, BATCH, IMAGES = 6, 3, 12, 36
SIZES = DiTConfig(4, 1, 8, (16, 24), (2, 1), (2, 2), 5, 0.0)


def losses(model: torch.nn.Module, micro: latents.MicroBatch, inputs: latents.Inputs) -> Tensor:
    """Squared distance from the latents' neighbours, which has a gradient everywhere from the first step on."""
    device = inputs.latent.device
    velocity = model(inputs.latent, (micro.key_tensor(device) % 7) / 7, micro.indices.to(device) % 5)
    return (velocity - inputs.latent.roll(1, dims=-1)).square().flatten(1).mean(1)


def poisoned(model: torch.nn.Module, micro: latents.MicroBatch, inputs: latents.Inputs) -> Tensor:
    """The same, NaN for the last place of step HALF + 1 (counted from 0)."""
    hit = torch.tensor([key == (HALF + 1) * BATCH + BATCH - 1 for key in micro.keys])
    return losses(model, micro, inputs) + torch.where(hit.to(inputs.latent.device), float("nan"), 0.0)


def trainer(state: Path, ranks: Ranks, sharding: str, micro_batch: int = 2, loss=losses, **options) -> Trainer:
    """Return a trainer that has taken up what the state holds."""
    if ranks.is_main:
        state.mkdir(parents=True, exist_ok=True)
    ranks.barrier()
    plan = latents.BatchPlan(0, IMAGES, BATCH, ranks.rank, ranks.world, micro_batch)
    model = DiT(SIZES, generator=torch.Generator().manual_seed(0)).to(ranks.device)
    optimizer_options = OptimizerOptions(ConstantThenLinear(1e-3, 1e-3, 0, 1), (0.9, 0.95), 0.0, 0.5, lambda step: 0.9)
    steps = {"checkpoint_every": HALF, "log_every": 1, "keep_checkpoints": 3, "logger": "none", **options}
    made = Run("train", model, loss, plan, state, ranks)
    return Trainer(made, optimizer_options, LoopOptions(**steps, sharding=sharding))


def run(state: Path, ranks: Ranks, sharding: str, **options) -> Trainer:
    """Train to the end."""
    made = trainer(state, ranks, sharding, **options)
    values = torch.randn(IMAGES, 8, 4, 4, generator=torch.Generator().manual_seed(1)).to(ranks.device)

    def cached(indices: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
        return values[indices.to(ranks.device)], torch.zeros(len(indices), 8, device=ranks.device)

    source = latents.TrainingImages("unread", 4, losses, cached, 0)
    if not made.resume(STEPS):
        made.run(STEPS, latents.TrainingBatches(made.plan, source, ranks.device))
    return made


def half_of(run_folder: Path, folder: Path, ranks: Ranks) -> Path:
    """Copy a run's state as it was at step HALF."""
    if ranks.is_main:
        shutil.copytree(run_folder / "state-x", folder / "state-x", ignore=shutil.ignore_patterns(f"step-*{STEPS}"))
    ranks.barrier()
    return folder / "state-x"


def main(folder: Path) -> None:
    """All that several processes are needed for, in one start."""
    with process_group() as ranks:
        for sharding in ("ddp", "fsdp"):
            made = run(folder / sharding / "state-x", ranks, sharding)
        shards = sum(t.numel() for t in (*made.division.tensors, *made.division.averages))
        whole = sum(p.numel() for p in made.model.parameters() if p.requires_grad)
        tensors = [t for part in ("model", "ema") for t in made.division.state(part).values()]
        for values in made.division.optimizer_state(made.optimizer)["state"].values():
            tensors += values.values()
        gathered = ranks.gather(sum(t.nbytes for t in tensors) / whole)
        run(half_of(folder / "fsdp", folder / "ddp-from-fsdp", ranks), ranks, "ddp")
        run(half_of(folder / "ddp", folder / "fsdp-from-ddp", ranks), ranks, "fsdp")
        run(folder / "fsdp-whole-share" / "state-x", ranks, "fsdp", micro_batch=0)
        # Traced as for the usual backend, but without its minutes in a C++ compiler.
        torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
        run(folder / "fsdp-compiled" / "state-x", ranks, "fsdp", compile=True)
        run(folder / "ddp-compiled" / "state-x", ranks, "ddp", compile=True)
        message = ""
        try:
            run(folder / "poisoned" / "state-x", ranks, "fsdp", loss=poisoned)
        except ValueError as error:
            message = str(error)
        overflow = {}
        for sharding in ("ddp", "fsdp"):
            made = trainer(folder / f"overflow-{sharding}" / "state-x", ranks, sharding)
            if not ranks.is_main:  # one process alone has the broken part
                made.division.averages[0].view(-1)[:1] = float("inf")
            try:
                made._save(None, milestone=False)
            except ValueError as error:
                overflow[sharding] = str(error)
        said = ranks.gather((message, overflow))
        if ranks.is_main:
            found = {"share": shards / (2 * whole), "gathered": gathered, "said": said}
            (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
