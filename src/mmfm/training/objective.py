"""The flow-matching loss."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmfm.config import Train
from mmfm.config.choices import SETTINGS
from mmfm.flow import path as flow
from mmfm.flow.source import Source, couple_modes
from mmfm.infra import rng
from mmfm.infra.precision import autocast
from mmfm.mixture.gaussian import Mixture
from mmfm.training import latents
from mmfm.training.weighting import LossWeighting


@dataclass(frozen=True)
class FlowMatching:
    """Flow matching from a source to the data (Lipman et al. 2023; with a mixture Luo et al. 2026).

    Attributes:
        setting: name in :data:`mmfm.config.choices.SETTINGS`.
        source: where paths start.
        mixture: of the global tokens; None for a Gaussian source.
        config: the section ``train``.
        shift: of the times, see :func:`mmfm.flow.path.train_times`.
        classes: class of every image, (N,) int64 on the CPU, and the number of classes; None if not used.
        weighting: of the losses by label; None for no weighting.
    """

    setting: str
    source: Source
    mixture: Mixture | None
    config: Train
    shift: float
    classes: tuple[Tensor, int] | None = None
    weighting: LossWeighting | None = None

    def losses(self, model: nn.Module, micro: latents.MicroBatch, inputs: latents.Inputs) -> Tensor:
        """Return the mean squared error of the velocity per image, times its label's weight, (b,) float32."""
        seed, x_data = self.config.seed, inputs.latent
        keys = micro.key_tensor(x_data.device)
        modes = None
        if self.mixture is not None:
            uniforms = rng.uniform(seed, "train/mode", keys)
            modes = couple_modes(self.mixture, inputs.token, uniforms, self.config.assignment)
        x_source = self.source.draw(modes, rng.normal(seed, "train/noise", keys, tuple(x_data.shape[1:])))
        t = flow.train_times(rng.uniform(seed, "train/time", keys), self.shift)
        x_t = flow.interpolate(x_data, x_source, t)
        seen = self.drop_labels(self.labels(SETTINGS[self.setting].condition, modes, micro.indices, keys.device), keys)
        with autocast(self.config.precision, x_data.device):
            velocity = model(x_t, t, seen)
        error = velocity.float() - flow.target_velocity(x_data, x_source)
        values = error.square().flatten(1).mean(1)
        if self.weighting is None:
            return values
        labels = self.labels(self.config.loss_weighting.by, modes, micro.indices, keys.device)
        return values if labels is None else self.weighting.weigh(values, labels)

    def labels(self, kind: str | None, modes: Tensor | None, images: Tensor, device: torch.device) -> Tensor | None:
        """Return the modes (b,) for ``mode``, the images' classes (b,) for ``class``, or None."""
        if kind == "class" and self.classes is not None:
            return self.classes[0].index_select(0, images.cpu()).to(device, non_blocking=True)
        return modes if kind == "mode" else None

    def count(self, kind: str | None) -> int:
        """Return the number of modes for ``mode``, of classes for ``class``, or 0."""
        return {"mode": self.source.num_modes, "class": self.classes[1] if self.classes else 0, None: 0}[kind]

    @property
    def num_labels(self) -> int:
        """Number of labels that the model is conditioned on; 0 for an unconditional model."""
        return self.count(SETTINGS[self.setting].condition)

    @property
    def label_dropout(self) -> float:
        """Probability that the model does not see the label."""
        dropout = {"mode": self.config.mode_dropout, "class": self.config.label_dropout, None: 0.0}
        return dropout[SETTINGS[self.setting].condition]

    def drop_labels(self, labels: Tensor | None, keys: Tensor) -> Tensor | None:
        """Replace some labels (b,) by the null label, the last row of the table; the source keeps its mode."""
        if labels is None or not self.label_dropout:
            return labels
        dropped = rng.uniform(self.config.seed, "train/dropout", keys) < self.label_dropout
        return torch.where(dropped, self.num_labels, labels)
