"""The optimiser's loop: accumulation, clipping, EMA, checkpoints, history, and stopping cleanly.

What is trained is a function from a micro batch to one loss per image; flow matching and the decoder share the rest.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmfm.infra import disk, memory
from mmfm.infra.distributed import Ranks, StopRequest
from mmfm.infra.progress import Progress
from mmfm.training import checkpoint
from mmfm.training.ema import Ema
from mmfm.training.fid_curve import FidCurve
from mmfm.training.latents import BatchPlan, MicroBatch
from mmfm.training.nonfinite import NonFiniteCheck, explanation
from mmfm.training.options import Batches, Callback, LoopOptions, Losses, OptimizerOptions
from mmfm.training.parallel import divide
from mmfm.training.runlog import Clock, RunLog


class Trainer:
    """Trains a model for a number of steps, from the newest checkpoint on.

    Args:
        stage: name for messages.
        model: on its device, initialised equally in all processes.
        losses: see :data:`Losses`.
        plan: which images stand where.
        state: directory of the checkpoints.
        preview: called with the average and the step on the main process; draws the picture
            :func:`mmfm.training.history.preview_file`.
        callback: see :class:`Callback`.
        distances: measured as the run goes; None for none.
    """

    def __init__(
        self,
        stage: str,
        model: nn.Module,
        losses: Losses,
        plan: BatchPlan,
        optimizer_options: OptimizerOptions,
        options: LoopOptions,
        state: Path,
        ranks: Ranks,
        preview: Callable[[nn.Module, int], None] | None = None,
        callback: Callback | None = None,
        distances: FidCurve | None = None,
    ) -> None:
        self.stage, self.model, self.losses, self.plan = stage, model, losses, plan
        self.optimizer_options, self.options = optimizer_options, options
        self.state, self.ranks, self.preview = state, ranks, preview
        self.callback, self.distances = callback, distances
        self.ema = None if optimizer_options.ema_decay is None else Ema(model, optimizer_options.ema_decay)
        self.division = divide(options.sharding, model, self.ema and self.ema.module, ranks, options.compile)
        if self.ema is not None:
            self.ema.follow(self.division.averages, self.division.tensors)
        self.optimizer = torch.optim.AdamW(
            self.division.tensors,
            lr=optimizer_options.lr(0),
            betas=optimizer_options.betas,
            weight_decay=optimizer_options.weight_decay,
            fused=True,
        )
        self.step = self.logged_step = 0
        self.seconds = 0.0
        device = ranks.device
        self.loss_sum = torch.zeros((), device=device)
        self.norm = torch.zeros((), device=device)
        self.nonfinite = NonFiniteCheck(device)

    def average(self) -> nn.Module:
        """The average, or else the model, as a plain module; a collective call, of use on the main process."""
        return self.division.whole_average()

    def resume(self, target: int) -> bool:
        """Take up the checkpoint that a run to step ``target`` goes on from; see :func:`mmfm.training.checkpoint.find`.

        Returns:
            Whether the run is finished, so that nothing is left but to publish; see also :meth:`owes`.

        Raises:
            ValueError: the disk has no room for the checkpoints of the run, or the weights found are not finite.
        """
        found = self.ranks.from_main(lambda: checkpoint.find(self.state, target))
        if found is None or found.step < target:
            self.ranks.from_main(lambda: self._require_disk(0 if found is None else found.step, target))
        if self.distances is not None:
            self.distances.resume(0 if found is None else found.step)
        if found is None:
            return False
        for part in ("model",) if self.ema is None else ("model", "ema"):
            self.division.load(part, found.tensors(part))
        self.division.load_optimizer(self.optimizer, found.optimizer())
        self.step, self.logged_step = found.step, found.values["logged_step"]
        self.seconds = found.values["seconds"]
        self.loss_sum.fill_(found.values["loss_sum"])
        if not self._finite():
            raise ValueError(
                f"the weights in '{found.path}' are not finite; remove it, and the run goes on from the checkpoint "
                "before it, or starts anew"
            )
        if self.callback is not None:
            self.callback.load(found.values["companion"], found.step)
        return self.step == target

    def owes(self, target: int) -> bool:
        """Whether a distance of the present step is to be measured in a run to step ``target``."""
        return self.distances is not None and self.distances.due(self.step, self.step == target)

    def run(self, target: int, batches: Batches | None) -> None:
        """Train until step ``target``, and measure what is due.

        Args:
            batches: not needed where that step is reached.

        Raises:
            ValueError: a loss, gradient or weight is not finite, or memory ran out; the last checkpoint is intact.
            KeyboardInterrupt: a signal asked to stop; a checkpoint of this very step was written before.
        """
        options, first = self.options, self.step
        goes_on = first < target
        self._run_log = RunLog(self.state, options.logger, first if goes_on else None, self.ranks)
        self._clock = Clock(first, self.seconds)
        self.nonfinite.start(first)
        progress = Progress(self.stage, target, "steps", done=first, enabled=self.ranks.is_main)
        closed = contextlib.closing(self._run_log)  # after a stop or an error too
        with closed, memory.explained(options.remedy), StopRequest() as stop, progress:
            # What a run that was killed while it measured had not finished.
            if self._measure(target, batches, stop, progress):
                self._leave(progress)
            if goes_on:
                self._train(target, batches, stop, progress)

    def _train(self, target: int, batches: Batches, stop: StopRequest, progress: Progress) -> None:
        options = self.options
        micro_batches, forward = batches.batches(self.step, target), self.division.wrapped(options.compile)
        while self.step < target:
            self._train_step(forward, micro_batches)
            last, note = self.step == target, ""
            if last or self.step % options.log_every == 0:
                note = self._log(batches)
            stopping = stop.agreed(self.ranks)
            milestone = last or self.step in options.milestones
            saved = milestone or stopping or self.step % options.checkpoint_every == 0
            if saved:
                self._save(batches, milestone)
            progress.advance(1, note)
            if self._shows() and not (last or stopping):
                self._preview(batches)
            if not stopping and self._measure(target, batches, stop, progress):
                stopping = True
                if not saved:
                    self._save(batches, milestone)
            if stopping and (not last or self.owes(target)):
                self._leave(progress)

    def _shows(self) -> bool:
        every = self.options.preview_every
        return self.preview is not None and every > 0 and self.step % every == 0

    def _leave(self, progress: Progress) -> None:
        progress.say(f"asked to stop: step {self.step:,} is saved")
        raise KeyboardInterrupt

    def _require_disk(self, step: int, target: int) -> None:
        """Ask for room for the checkpoints kept, the milestones to come, the one being written, and the weights."""
        weights = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())
        trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        one = (1 if self.ema is None else 2) * weights + 2 * trained
        milestones = len({target, *(s for s in self.options.milestones if step < s < target)})
        total = (self.options.keep_checkpoints + milestones + 1) * one + weights
        # Milestones that are there give no room back; the first new checkpoint is written before an old one goes.
        disk.require(self.state, self.stage, total, min(checkpoint.replaceable(self.state), total - one))

    def _train_step(self, forward: nn.Module, micro_batches: Iterator[tuple[MicroBatch, Any]]) -> None:
        """Take one optimiser step on the mean loss of the global batch; nothing here waits for the device."""
        world, places = self.ranks.world, self.plan.global_batch
        parts = self.plan.micro_batches_per_step
        loss = torch.zeros((), device=self.ranks.device)
        self.division.forget_gradients()
        for part in range(parts):
            micro, inputs = next(micro_batches)
            with self.division.part(forward, last=part == parts - 1):
                share = self.losses(forward, micro, inputs).sum() / places
                # Gradients are averaged over processes, but each one's sum is a part of the global mean.
                (share * world).backward()
            loss += share.detach()
        self.ranks.sum(loss)
        self.norm = self.division.norm(self.division.gradients())
        if self.optimizer_options.clip_norm:
            nn.utils.clip_grads_with_norm_(self.division.tensors, self.optimizer_options.clip_norm, self.norm)
        self.nonfinite.note(loss, self.norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.optimizer_options.lr(self.step)
        self.optimizer.found_inf = self.nonfinite.broken
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update()
        self.loss_sum += loss
        self.step += 1
        if self.callback is not None:
            self.callback.after_step(self.ranks, self.step)

    def _log(self, batches: Batches) -> str:
        """Read the loss from the device, write a line of history and return a note for the progress line."""
        self._check(batches)
        loss, norm = torch.stack((self.loss_sum, self.norm)).tolist()
        loss /= self.step - self.logged_step
        self.seconds = self._clock.seconds
        rate = self._clock.steps_per_second(self.step) * self.plan.global_batch
        line = {
            "step": self.step,
            "epoch": round(self.step / self.plan.steps_per_epoch, 4),
            "loss": loss,
            "grad_norm": norm,
            "lr": self.optimizer_options.lr(self.step - 1),
            "images_per_second": round(rate, 2),
            "seconds": round(self.seconds, 3),
        }
        self._run_log.add(line)
        self.loss_sum.zero_()
        self.logged_step = self.step
        return f"loss {loss:.4f}  gradient norm {norm:.3g}  {rate:,.1f} images/s"

    def _save(self, batches: Batches, milestone: bool) -> None:
        """Write a checkpoint, of finite weights only."""
        self._check(batches)
        self._check_weights()
        self.seconds = self._clock.seconds
        tensors = {part: self.division.state(part) for part in (("model",) if self.ema is None else ("model", "ema"))}
        optimizer = self.division.optimizer_state(self.optimizer)

        def save() -> None:
            values = {"loss_sum": self.loss_sum.item(), "logged_step": self.logged_step, "seconds": self.seconds}
            if self.callback is not None:
                values["companion"] = self.callback.state()
            checkpoint.save(
                self.state, self.step, tensors, optimizer, values,
                milestone=milestone, keep=self.options.keep_checkpoints,
            )  # fmt: skip

        self.ranks.from_main(save)

    def _preview(self, batches: Batches) -> None:
        self._check(batches)
        remedy = "Lower train.preview.n_images, or set train.preview.every to 0; neither changes the weights"
        with self._clock.stopped(), memory.explained(remedy):
            average = self.average()
            self.ranks.from_main(lambda: self.preview(average, self.step))
            self._run_log.add_preview(self.step)

    def _measure(self, target: int, batches: Batches | None, stop: StopRequest, progress: Progress) -> bool:
        """Measure the present step if that is due, and return whether the run was asked to stop meanwhile."""
        if not self.owes(target):
            return False
        self._check(batches)
        remedy = "Set train.preview.fid_every to 0; it changes no weight"
        with self._clock.stopped(), memory.explained(remedy):
            average = self.division.whole_average(everywhere=True)
            line = self.distances.measure(average, self.step, lambda: stop.agreed(self.ranks), progress.say)
            if line is not None:
                self._run_log.add_distance(line, self.distances.title)
        return stop.agreed(self.ranks)

    def _check(self, batches: Batches | None) -> None:
        """Raise ValueError if a step since the last check met a loss or gradient that is not finite.

        Before anything is written or shown of the weights: since that step they stand still.
        """
        step = self.nonfinite.first_broken()
        if step is not None:
            self._check_weights()  # these would make every loss NaN: no image is to blame
            found = self.ranks.gather(self._culprits(step, batches))
            raise ValueError(explanation(self.plan, step, sorted(index for images in found for index in images)))

    def _check_weights(self) -> None:
        """Raise ValueError if weights or average have no finite norm: the update of a finite gradient can overflow."""
        if not self._finite():
            raise ValueError(
                f"the weights are NaN, Inf or too large by step {self.step:,}, though loss and gradient were finite "
                "before: an update was too large. The last checkpoint is intact; lower the learning rate"
            )

    @torch.no_grad()
    def _finite(self) -> bool:
        """Whether all that is trained, and its average, has a finite norm in every process; a collective call."""
        norm = nn.utils.get_total_norm([*self.division.tensors, *self.division.averages])
        return self.ranks.sum(1 - norm.isfinite().float()).item() == 0

    @torch.no_grad()
    def _culprits(self, step: int, batches: Batches) -> list[int]:
        """This process's images whose loss in ``step`` is not finite; the weights are still those of that step."""
        found: list[int] = []
        for micro, inputs in batches.batches(step, step + 1):
            losses = self.losses(self.model, micro, inputs)
            found += micro.indices[~losses.isfinite().cpu()].tolist()
        return found
