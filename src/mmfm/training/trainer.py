"""The optimiser's loop: accumulation, clipping, EMA, checkpoints, history, and stopping cleanly.

What is trained is a function from a micro batch to one loss per image; flow matching and the decoder share the rest.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmfm.infra import space
from mmfm.infra.distributed import Ranks, StopRequest
from mmfm.infra.progress import Progress
from mmfm.training import checkpoint, memory
from mmfm.training.board import open_board
from mmfm.training.ema import Ema
from mmfm.training.history import History
from mmfm.training.latents import MicroBatch, Plan
from mmfm.training.parallel import divide

Losses = Callable[[nn.Module, MicroBatch, Any], Tensor]
"""(model, micro batch, its inputs) -> (b,) float32, the loss of every image."""


class Feed(Protocol):
    """Gives the micro batches of consecutive steps, each with its inputs."""

    def batches(self, first_step: int, stop_step: int) -> Iterator[tuple[MicroBatch, Any]]:
        """Yield the micro batches of steps [first_step, stop_step) with their inputs."""


class Companion(Protocol):
    """What moves with the steps besides the weights, and is kept in the checkpoints."""

    def after_step(self, ranks: Ranks, step: int) -> None:
        """Take note that ``step`` steps are taken; called by all processes, must not wait for the device."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON values."""

    def load(self, state: dict[str, Any], step: int) -> None:
        """Take up what a checkpoint of ``step`` keeps."""


@dataclass(frozen=True)
class Recipe:
    """What the optimiser does: AdamW (Loshchilov and Hutter 2019).

    Attributes:
        lr: learning rate of a step, counted from 0.
        betas, weight_decay: of AdamW.
        clip_norm: largest norm of the whole gradient; 0 for no clipping.
        ema_decay: of the average; None for none.
    """

    lr: Callable[[int], float]
    betas: tuple[float, float]
    weight_decay: float
    clip_norm: float
    ema_decay: float | None


@dataclass(frozen=True)
class Routine:
    """How often a run does what changes no number; all in steps.

    Attributes:
        checkpoint_every, log_every: intervals.
        keep_checkpoints: newest checkpoints that stay.
        preview_every: interval of previews; 0 for none.
        compile: use torch.compile.
        sharding: how the model is divided among processes; see :mod:`mmfm.training.parallel`.
        milestones: steps whose checkpoints stay for ever.
        logger: where the run is shown; see :mod:`mmfm.training.board`.
        remedy: what to do when memory runs out.
    """

    checkpoint_every: int
    log_every: int
    keep_checkpoints: int
    preview_every: int = 0
    compile: bool = False
    sharding: str = "ddp"
    milestones: frozenset[int] = frozenset()
    logger: str = "tensorboard"
    remedy: str = "lower the micro batch"


class Trainer:
    """Trains a model for a number of steps, from the newest checkpoint on.

    Args:
        stage: name for messages.
        model: on its device, initialised equally in all processes.
        losses: see :data:`Losses`.
        plan: which images stand where.
        state: directory of the checkpoints.
        preview: called with the step on the main process; may draw pictures of the present weights.
        companion: see :class:`Companion`.
    """

    def __init__(
        self,
        stage: str,
        model: nn.Module,
        losses: Losses,
        plan: Plan,
        recipe: Recipe,
        routine: Routine,
        state: Path,
        ranks: Ranks,
        preview: Callable[[int], None] | None = None,
        companion: Companion | None = None,
    ) -> None:
        self.stage, self.model, self.losses, self.plan = stage, model, losses, plan
        self.recipe, self.routine, self.state, self.ranks, self.preview = recipe, routine, state, ranks, preview
        self.companion = companion
        self.ema = None if recipe.ema_decay is None else Ema(model, recipe.ema_decay)
        self.division = divide(routine.sharding, model, self.ema and self.ema.module, ranks, routine.compile)
        if self.ema is not None:
            self.ema.follow(self.division.averages, self.division.tensors)
        self.optimizer = torch.optim.AdamW(
            self.division.tensors, lr=recipe.lr(0), betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
        )
        self._averaged = self.model if self.ema is None else self.ema.module
        self.step = self.logged_step = 0
        self.seconds = 0.0
        device = ranks.device
        self.loss_sum = torch.zeros((), device=device)
        self.norm = torch.zeros((), device=device)
        # Set on the device by the first step whose loss or gradient is not finite. The optimiser then leaves everything
        # as it is, in that step and the following, until the host reads the flag.
        self.broken = torch.zeros((), device=device)
        self.good_steps = torch.zeros((), device=device, dtype=torch.float64)

    @property
    def averaged(self) -> nn.Module:
        """The average as a plain module, or the model itself without one; for the main process, when it is called."""
        return self._averaged

    def resume(self, target: int) -> bool:
        """Take up the checkpoint that a run to step ``target`` goes on from; see :func:`mmfm.training.checkpoint.find`.

        Returns:
            Whether the run is finished, so that nothing is left but to publish.

        Raises:
            ValueError: the disk has no room for the checkpoints of the run.
        """
        found = self.ranks.from_main(lambda: checkpoint.find(self.state, target))
        if found is None or found.step < target:
            self.ranks.from_main(lambda: space.require(self.state, self.stage, self._disk()))
        if found is None:
            return False
        for part in ("model",) if self.ema is None else ("model", "ema"):
            self.division.load(part, found.tensors(part))
        self.division.load_optimizer(self.optimizer, found.optimizer())
        self.step, self.logged_step = found.step, found.values["logged_step"]
        self.seconds = found.values["seconds"]
        self.loss_sum.fill_(found.values["loss_sum"])
        if self.companion is not None:
            self.companion.load(found.values["companion"], found.step)
        self._averaged = self.division.whole_average()
        return self.step == target

    def run(self, target: int, feed: Feed) -> None:
        """Train until step ``target``.

        Raises:
            ValueError: a loss or gradient is not finite, or memory ran out; the last checkpoint is intact.
            KeyboardInterrupt: a signal asked to stop; a checkpoint of this very step was written before.
        """
        routine, first = self.routine, self.step
        history = self._history(first)
        self._board = open_board(routine.logger, self.state, self.stage, history.lines) if history else None
        batches, forward = feed.batches(first, target), self.division.wrapped(routine.compile)
        self.good_steps.fill_(first)
        self._clock = (time.perf_counter(), first, self.seconds)
        self._last_log = (self._clock[0], first)
        progress = Progress(self.stage, target, "steps", done=first, enabled=self.ranks.is_main)
        with memory.explained(routine.remedy), StopRequest() as stop, progress:
            while self.step < target:
                self._train_step(forward, batches)
                last, note = self.step == target, ""
                if last or self.step % routine.log_every == 0:
                    note = self._log(history, feed)
                stopping = stop.agreed(self.ranks)
                milestone = last or self.step in routine.milestones
                if milestone or stopping or self.step % routine.checkpoint_every == 0:
                    self._save(feed, milestone)
                progress.advance(1, note)
                if routine.preview_every and (self.step % routine.preview_every == 0) and not last:
                    self._preview()
                if stopping and not last:
                    progress.say(f"asked to stop: step {self.step:,} is saved")
                    raise KeyboardInterrupt
        if self._board is not None:
            self._board.close()
        self._averaged = self.division.whole_average()

    def _disk(self) -> int:
        """Bytes that a run writes: the checkpoints kept, a milestone, the one being written, and the weights."""
        weights = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())
        trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        one = (1 if self.ema is None else 2) * weights + 2 * trained
        return (self.routine.keep_checkpoints + 2) * one + weights

    def _history(self, step: int) -> History | None:
        """The history that is appended to from ``step`` on; None but on the main process."""
        made: list[History] = []
        self.ranks.from_main(lambda: made.append(History(self.state / "history.jsonl", step)))
        return made[0] if made else None

    def _train_step(self, forward: nn.Module, batches: Iterator[tuple[MicroBatch, Any]]) -> None:
        """Take one optimiser step on the mean loss of the global batch; nothing here waits for the device."""
        world, places = self.ranks.world, self.plan.global_batch
        parts = self.plan.micro_batches_per_step
        loss = torch.zeros((), device=self.ranks.device)
        self.division.forget_gradients()
        for part in range(parts):
            micro, inputs = next(batches)
            with self.division.part(forward, last=part == parts - 1):
                share = self.losses(forward, micro, inputs).sum() / places
                # Gradients are averaged over processes, but each one's sum is a part of the global mean.
                (share * world).backward()
            loss += share.detach()
        self.ranks.sum(loss)
        self.norm = self.division.norm(self.division.gradients())
        if self.recipe.clip_norm:
            nn.utils.clip_grads_with_norm_(self.division.tensors, self.recipe.clip_norm, self.norm)
        self.broken = torch.maximum(self.broken, 1 - (loss.isfinite() & self.norm.isfinite()).float())
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr(self.step)
        # The fused kernels skip the step where this is 1: what loss scaling uses for the same purpose.
        self.optimizer.found_inf = self.broken
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update()
        self.loss_sum += loss
        self.good_steps += 1 - self.broken
        self.step += 1
        if self.companion is not None:
            self.companion.after_step(self.ranks, self.step)

    def _log(self, history: History | None, feed: Feed) -> str:
        """Read the loss from the device, write a line of history and return a note for the progress line."""
        self._check(feed)
        loss, norm = torch.stack((self.loss_sum, self.norm)).tolist()
        loss /= self.step - self.logged_step
        now = time.perf_counter()
        self.seconds = self._clock[2] + now - self._clock[0]
        rate = (self.step - self._last_log[1]) * self.plan.global_batch / max(now - self._last_log[0], 1e-9)
        line = {
            "step": self.step,
            "epoch": round(self.step / self.plan.steps_per_epoch, 4),
            "loss": loss,
            "grad_norm": norm,
            "lr": self.recipe.lr(self.step - 1),
            "images_per_second": round(rate, 2),
            "seconds": round(self.seconds, 3),
        }

        def write() -> None:
            history.append(line)
            self._board.write(line)

        self.ranks.from_main(write)
        self.loss_sum.zero_()
        self.logged_step, self._last_log = self.step, (now, self.step)
        return f"loss {loss:.4f}  gradient norm {norm:.3g}  {rate:,.1f} images/s"

    def _save(self, feed: Feed, milestone: bool) -> None:
        """Write a checkpoint, of finite weights only."""
        self._check(feed)
        self.seconds = self._clock[2] + time.perf_counter() - self._clock[0]
        tensors = {part: self.division.state(part) for part in (("model",) if self.ema is None else ("model", "ema"))}
        optimizer = self.division.optimizer_state(self.optimizer)

        def save() -> None:
            values = {"loss_sum": self.loss_sum.item(), "logged_step": self.logged_step, "seconds": self.seconds}
            if self.companion is not None:
                values["companion"] = self.companion.state()
            checkpoint.save(
                self.state, self.step, tensors, optimizer, values,
                milestone=milestone, keep=self.routine.keep_checkpoints,
            )  # fmt: skip

        self.ranks.from_main(save)

    def _preview(self) -> None:
        self._averaged = self.division.whole_average()
        if self.preview is not None:
            self.ranks.from_main(lambda: self.preview(self.step))

    def _check(self, feed: Feed) -> None:
        """Raise ValueError if a step since the last check met a loss or gradient that is not finite."""
        broken, good_steps = torch.stack((self.broken.double(), self.good_steps)).tolist()
        if not broken:
            return
        step = int(good_steps)
        culprits = sorted(index for found in self.ranks.gather(self._culprits(step, feed)) for index in found)
        if culprits:
            blame = f"the loss of image {', '.join(map(str, culprits[:8]))} of the listing is"
        else:
            first = step * self.plan.global_batch
            images = self.plan.images(range(first, first + self.plan.global_batch)).tolist()
            blame = f"the gradient is, over the images {', '.join(map(str, images[:8]))}, ... of the listing"
        if len(culprits) > 8:
            blame = blame.replace(" of the listing", f" (and {len(culprits) - 8} more) of the listing")
        raise ValueError(
            f"NaN or Inf in step {step + 1}: {blame}; the weights are as before it and the last checkpoint is intact. "
            "Lower the learning rate, use precision float32, or look at these images"
        )

    @torch.no_grad()
    def _culprits(self, step: int, feed: Feed) -> list[int]:
        """This process's images whose loss in ``step`` is not finite; the weights are still those of that step."""
        found: list[int] = []
        for micro, inputs in feed.batches(step, step + 1):
            losses = self.losses(self.model, micro, inputs)
            found += micro.images[~losses.isfinite().cpu()].tolist()
        return found
