"""The training loop: gradient accumulation, clipping, EMA, checkpoints, history and a clean stop.

It trains any model given a function from a micro batch to one loss per image; flow matching and the decoder share it.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from mmfm.infra import disk, memory
from mmfm.infra.distributed import StopRequest
from mmfm.infra.progress import Progress
from mmfm.training import checkpoint
from mmfm.training.ema import Ema
from mmfm.training.fid_curve import FidCurve
from mmfm.training.latents import MicroBatch
from mmfm.training.nonfinite import NonFiniteCheck, explanation
from mmfm.training.options import Batches, LoopOptions, OptimizerOptions, Run
from mmfm.training.parallel import divide
from mmfm.training.profile import Profile
from mmfm.training.runlog import Clock, RunLog
from mmfm.training.usage import bf16_peak


class Trainer:
    """Trains a model up to a step, starting from the newest checkpoint.

    Args:
        preview: called on the main process with the average and the step; writes
            :func:`mmfm.training.history.preview_file`.
        distances: measured during the run; None for none.
    """

    def __init__(
        self,
        run: Run,
        optimizer_options: OptimizerOptions,
        options: LoopOptions,
        preview: Callable[[nn.Module, int], None] | None = None,
        distances: FidCurve | None = None,
    ) -> None:
        self.stage, self.model, self.losses, self.plan = run.stage, run.model, run.losses, run.plan
        self.state, self.ranks, self.callback = run.state, run.ranks, run.callback
        self.encoding, self.step_flops = run.encoding, 3 * run.flops * run.plan.global_batch
        self.optimizer_options, self.options = optimizer_options, options
        self.preview, self.distances = preview, distances
        self.ema = None if optimizer_options.ema_decay is None else Ema(self.model)
        average = None if self.ema is None else self.ema.module
        self.division = divide(options.sharding, self.model, average, self.ranks, options.compile)
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
        self.seconds = self.waited = 0.0
        device = self.ranks.device
        self.peak_flops = self.ranks.world * bf16_peak(device)
        self.loss_sum = torch.zeros((), device=device)
        self.norm = torch.zeros((), device=device)
        self.nonfinite = NonFiniteCheck(device)

    def average(self) -> nn.Module:
        """Return the average, or without EMA the model, as a plain module; collective, valid on the main process."""
        return self.division.whole_average()

    def resume(self, target: int) -> bool:
        """Restore the checkpoint that a run to step ``target`` continues; see :func:`mmfm.training.checkpoint.find`.

        Returns:
            Whether training is finished; a distance may still be missing, see :meth:`owes`.

        Raises:
            ValueError: the disk has no room for the run's checkpoints, or the restored weights are not finite.
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
                f"the weights in '{found.path}' are not finite; remove it, and the run continues from the checkpoint "
                "before it, or starts over"
            )
        if self.callback is not None:
            self.callback.load(found.values["companion"], found.step)
        return self.step == target

    def owes(self, target: int) -> bool:
        """Whether a run to step ``target`` still has to measure a distance at the current step."""
        return self.distances is not None and self.distances.due(self.step, self.step == target)

    def run(self, target: int, batches: Batches | None) -> None:
        """Train to step ``target`` and measure the distances that are due.

        Args:
            batches: None if ``target`` is already reached.

        Raises:
            ValueError: a loss, gradient or weight is not finite, or memory ran out; the last checkpoint is intact.
            KeyboardInterrupt: a signal asked to stop; a checkpoint of the current step was saved.
        """
        options, first = self.options, self.step
        self._run_log = RunLog(self.state, options.logger, first if first < target else None, self.ranks)
        self._clock = Clock(first, self.seconds)
        self.nonfinite.start(first)
        progress = Progress(self.stage, target, "steps", done=first, enabled=self.ranks.is_main)
        closing = contextlib.closing(self._run_log)
        with closing, memory.explained(options.remedy), StopRequest() as stop, progress:
            # A run killed during a measurement has to repeat it.
            if self._measure(target, batches, stop, progress):
                self._leave(progress)
            if batches is not None and first < target:
                self._train(target, batches, stop, progress)

    def _train(self, target: int, batches: Batches, stop: StopRequest, progress: Progress) -> None:
        options = self.options
        micro_batches, forward = batches.batches(self.step, target), self.division.wrapped(options.compile)
        profile = Profile(options.profile, self.state / "profile", self.ranks)
        while self.step < target:
            with profile.step(self.step + 1, progress.say):
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
            if not (last or stopping):
                self._preview(batches)
            if not stopping and self._measure(target, batches, stop, progress):
                stopping = True
                if not saved:
                    self._save(batches, milestone)
            if stopping and (not last or self.owes(target)):
                self._leave(progress)

    def _leave(self, progress: Progress) -> None:
        progress.say(f"asked to stop: step {self.step:,} is saved")
        raise KeyboardInterrupt

    def _require_disk(self, step: int, target: int) -> None:
        """Require disk space for the kept checkpoints, the milestones, one being written, and the published weights."""
        weights = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())
        trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        milestones = len({target, *(s for s in self.options.milestones if step < s < target)})
        total, one = disk.of_checkpoints(
            weights,
            trained,
            average=self.ema is not None,
            keep=self.options.keep_checkpoints,
            milestones=milestones,
        )
        # Existing milestones free nothing, and the first new checkpoint is written before an old one is removed.
        disk.require(self.state, self.stage, total, min(checkpoint.replaceable(self.state), total - one))

    def _train_step(self, forward: nn.Module, micro_batches: Iterator[tuple[MicroBatch, Any]]) -> None:
        """Take one optimiser step on the mean loss of the global batch, without waiting for the device."""
        world, places = self.ranks.world, self.plan.global_batch
        parts = self.plan.micro_batches_per_step
        loss = torch.zeros((), device=self.ranks.device)
        self.division.forget_gradients()
        for part in range(parts):
            asked = time.perf_counter()
            micro, inputs = next(micro_batches)
            self.waited += time.perf_counter() - asked
            with self.division.part(forward, last=part == parts - 1):
                share = self.losses(forward, micro, inputs).sum() / places
                # The processes' gradients are averaged, but each share is a summand of the global mean.
                (share * world).backward()
            loss += share.detach()
        self.ranks.sum(loss)
        self.norm = self.division.norm(self.division.gradients())
        if self.optimizer_options.clip_norm:
            nn.utils.clip_grads_with_norm_(self.division.tensors, self.optimizer_options.clip_norm, self.norm)
        self.nonfinite.note(loss, self.norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.optimizer_options.lr(self.step)
        self.optimizer.found_inf = self.nonfinite.broken  # type: ignore[attr-defined]  # not in torch's annotations
        self.optimizer.step()
        if self.ema is not None and self.optimizer_options.ema_decay is not None:
            self.ema.update(self.optimizer_options.ema_decay(self.step))
        self.loss_sum += loss
        self.step += 1
        if self.callback is not None:
            self.callback.after_step(self.ranks, self.step)

    def _log(self, batches: Batches) -> str:
        """Read the loss from the device, add a line to the history, and return a note for the progress line."""
        self._check(batches)
        loss, norm = torch.stack((self.loss_sum, self.norm)).tolist()
        loss /= self.step - self.logged_step
        self.seconds = self._clock.seconds
        steps, speed = self.step - self.logged_step, self._clock.steps_per_second(self.step)
        rate = speed * self.plan.global_batch
        line = {
            "step": self.step,
            "epoch": round(self.step / self.plan.steps_per_epoch, 4),
            "loss": loss,
            "grad_norm": norm,
            "lr": self.optimizer_options.lr(self.step - 1),
            "images_per_second": round(rate, 2),
            "data_wait": round(min(1.0, self.waited * speed / steps), 4),
            "seconds": round(self.seconds, 3),
        }
        if self.encoding is not None:
            line["encoder_share"] = round(min(1.0, self.encoding.take() * speed / steps), 4)
        if self.peak_flops and self.step_flops:
            line["mfu"] = round(speed * self.step_flops / self.peak_flops, 4)
        note = f"loss {loss:.4f}  gradient norm {norm:.3g}  {rate:,.1f} images/s"
        if self.ranks.device.type == "cuda":
            line["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            note += f"  waiting for data {line['data_wait']:.0%}"
            shown = {"encoder": line.get("encoder_share"), "MFU": line.get("mfu")}
            note += "".join(f"  {name} {share:.0%}" for name, share in shown.items() if share is not None)
            note += f"  peak {line['peak_gb']:.1f} GB"
        self._run_log.add(line)
        self.loss_sum.zero_()
        self.waited = 0.0
        self.logged_step = self.step
        return note

    def _save(self, batches: Batches, milestone: bool) -> None:
        """Save a checkpoint after checking that the weights are finite."""
        self._check(batches)
        self._check_weights()
        self.seconds = self._clock.seconds
        tensors = {part: self.division.state(part) for part in (("model",) if self.ema is None else ("model", "ema"))}
        optimizer = self.division.optimizer_state(self.optimizer)

        def save() -> None:
            """Write the checkpoint on the main process."""
            values: dict[str, Any] = {
                "loss_sum": self.loss_sum.item(),
                "logged_step": self.logged_step,
                "seconds": self.seconds,
            }
            if self.callback is not None:
                values["companion"] = self.callback.state()
            keep = self.options.keep_checkpoints
            checkpoint.save(self.state, self.step, tensors, optimizer, values, milestone=milestone, keep=keep)

        self.ranks.from_main(save)

    def _preview(self, batches: Batches) -> None:
        """Draw the preview of the current step if it is due."""
        draw, every = self.preview, self.options.preview_every
        if draw is None or every == 0 or self.step % every:
            return
        self._check(batches)
        remedy = "Lower train.preview.n_images, or set train.preview.every to 0; neither affects the weights"
        with self._clock.stopped(), memory.explained(remedy):
            average = self.average()
            self.ranks.from_main(lambda: draw(average, self.step))
            self._run_log.add_preview(self.step)

    def _measure(self, target: int, batches: Batches | None, stop: StopRequest, progress: Progress) -> bool:
        """Measure the distance of the current step if it is due; return whether the run was asked to stop meanwhile."""
        if self.distances is None or not self.owes(target):
            return False
        self._check(batches)
        remedy = "Set train.preview.fid_every to 0; this does not affect the weights"
        with self._clock.stopped(), memory.explained(remedy):
            average = self.division.whole_average(everywhere=True)
            line = self.distances.measure(average, self.step, lambda: stop.agreed(self.ranks), progress.say)
            if line is not None:
                self._run_log.add_distance(line, self.distances.title)
        return stop.agreed(self.ranks)

    def _check(self, batches: Batches | None) -> None:
        """Raise ValueError if the loss or gradient of a step since the last check was not finite.

        Called before the weights are saved or shown: they have been frozen since that step.
        """
        step = self.nonfinite.first_broken()
        if step is None or batches is None:  # without batches no step was taken
            return
        self._check_weights()  # if these are not finite, no image is to blame
        found = self.ranks.gather(self._culprits(step, batches))
        raise ValueError(explanation(self.plan, step, sorted(index for images in found for index in images)))

    def _check_weights(self) -> None:
        """Raise ValueError if weights or average have no finite norm: even a finite gradient's update can overflow."""
        if not self._finite():
            raise ValueError(
                f"the weights are NaN, Inf or too large by step {self.step:,}, although loss and gradient were finite: "
                "an update was too large. The last checkpoint is intact; lower the learning rate"
            )

    @torch.no_grad()
    def _finite(self) -> bool:
        """Whether the trained weights and their average have a finite norm in every process; a collective call."""
        norm = nn.utils.get_total_norm([*self.division.tensors, *self.division.averages])
        return self.ranks.sum(1 - norm.isfinite().float()).item() == 0

    @torch.no_grad()
    def _culprits(self, step: int, batches: Batches) -> list[int]:
        """Return this process's images with a non-finite loss in ``step``, whose weights are still in place."""
        found: list[int] = []
        for micro, inputs in batches.batches(step, step + 1):
            losses = self.losses(self.model, micro, inputs)
            found += micro.indices[~losses.isfinite().cpu()].tolist()
        return found
