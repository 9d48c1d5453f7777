"""The loss of flow matching, and what a model is shown of a training image."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmfm import config
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
    """The loss of flow matching from a source to the data (Lipman et al. 2023; Luo et al. 2026 for the mixture).

    Attributes:
        setting: name in :data:`mmfm.config.choices.SETTINGS`.
        source: where paths start.
        mixture: of the global tokens; None for a Gaussian source.
        settings: the section ``train``.
        shift: of the times.
        classes: class of every image, (N,) int64 on the CPU, and their number; None where no class is used.
        weighting: of the losses by label; None for none.
    """

    setting: str
    source: Source
    mixture: Mixture | None
    settings: config.Train
    shift: float
    classes: tuple[Tensor, int] | None = None
    weighting: LossWeighting | None = None

    def losses(self, model: nn.Module, micro: latents.MicroBatch, inputs: latents.Inputs) -> Tensor:
        """Mean squared error of the velocity per image, times its label's weight, (b,) float32."""
        seed, x_data = self.settings.seed, inputs.latent
        keys = micro.key_tensor(x_data.device)
        modes = None
        if self.mixture is not None:
            uniforms = rng.uniform(seed, "train/mode", keys)
            modes = couple_modes(self.mixture, inputs.token, uniforms, self.settings.assignment)
        x_source = self.source.draw(modes, rng.normal(seed, "train/noise", keys, tuple(x_data.shape[1:])))
        t = flow.train_times(rng.uniform(seed, "train/time", keys), self.shift)
        x_t = flow.interpolate(x_data, x_source, t)
        seen = self.drop_labels(self.labels(SETTINGS[self.setting].condition, modes, micro.indices, keys.device), keys)
        with autocast(self.settings.precision, x_data.device):
            velocity = model(x_t, t, seen)
        error = velocity.float() - flow.target_velocity(x_data, x_source)
        values = error.square().flatten(1).mean(1)
        if self.weighting is None:
            return values
        by = self.settings.loss_weighting.by
        return self.weighting.weigh(values, self.labels(by, modes, micro.indices, keys.device))

    def labels(self, kind: str | None, modes: Tensor | None, images: Tensor, device: torch.device) -> Tensor | None:
        """The modes (b,) for ``mode``, the classes of the images (b,) for ``class``, or None."""
        if kind != "class":
            return modes if kind == "mode" else None
        return self.classes[0].index_select(0, images.cpu()).to(device, non_blocking=True)

    @property
    def num_labels(self) -> int:
        """Labels that the model is conditioned on; 0 for none."""
        return {"mode": self.source.num_modes, "class": self.classes[1] if self.classes else 0, None: 0}[
            SETTINGS[self.setting].condition
        ]

    @property
    def label_dropout(self) -> float:
        """Probability with which the model does not see the label."""
        dropout = {"mode": self.settings.mode_dropout, "class": self.settings.label_dropout, None: 0.0}
        return dropout[SETTINGS[self.setting].condition]

    def drop_labels(self, labels: Tensor | None, keys: Tensor) -> Tensor | None:
        """Replace labels (b,) by the null label, the last row of the table; the source keeps its mode."""
        if labels is None or not self.label_dropout:
            return labels
        dropped = rng.uniform(self.settings.seed, "train/dropout", keys) < self.label_dropout
        return torch.where(dropped, self.num_labels, labels)
