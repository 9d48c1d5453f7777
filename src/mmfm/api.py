"""The Python API: open what the workflow finished; encode, decode, generate, interpolate, compare.

``import mmfm`` hands these names on and imports PyTorch only when one of them is used. docs/python.md is the guide.
"""

from functools import cached_property
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from mmfm import data
from mmfm.autoencoder import rae
from mmfm.autoencoder.encoders import load_encoder
from mmfm.autoencoder.rae import Encoded
from mmfm.data.moments import CovarianceMoments
from mmfm.data.tokens import TokenStore
from mmfm.evaluation import contact_sheet
from mmfm.evaluation.detector import Detector, load_detector
from mmfm.evaluation.frechet import frechet_distance
from mmfm.evaluation.reference import Reference
from mmfm.flow.solver import VelocityFn
from mmfm.generation import batches
from mmfm.generation.between import between
from mmfm.generation.generator import Draw
from mmfm.generation.images import ImageInput, Images, pixels
from mmfm.generation.options import Numbers, Sampling, changed, given
from mmfm.generation.sampler import Sampler
from mmfm.generation.trajectory import Trajectory, trajectory
from mmfm.mixture.gaussian import Mixture
from mmfm.stages import provenance
from mmfm.workflow import finished

__all__ = ["Detector", "Encoded", "Images", "Mixture", "Model", "Trajectory", "distance", "load_detector", "open"]

_Fixed = tuple[Tensor | None, Tensor | None]


def open(target: str | Path, device: torch.device | str | None = None) -> "Model":
    """Open a finished target: a result, or the folder of a sampling or a training.

    Args:
        target: ``results/fid/NAME.txt``, ``results/sample/NAME/VARIANT`` or ``results/train/NAME/VARIANT``. Weights of
            a training are sampled as the last run's configuration says.
        device: where to compute; None: on a GPU if there is one.

    Raises:
        FileNotFoundError: the target, or a file that it was made from, is not there; the message names it and the
            command that makes it.
        ValueError: it is no target, or files do not belong together.

    >>> model = mmfm.open("results/fid/dinov2_mode.txt", device="cpu")
    >>> model
    <mmfm.Model: dinov2, setting mode, ... modes, images of 32 pixels, on cpu>
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Model(finished.find(target), device)


class Model:
    """A trained model with encoder, decoder and mixture; made by :func:`open`.

    Attributes:
        setting: ``uncond``, ``gmm``, ``mode``, ``class`` or ``class_gmm``.
        num_modes: K, modes of the source; 0 for a Gaussian source.
        num_labels: modes or classes that the model can be given; 0 for none.
        latent_shape: (C, H, W).
        image_size: S, pixels.
        device: where everything is computed.
    """

    def __init__(self, found: finished.Finished, device: torch.device) -> None:
        self._found, self.device = found, device
        self.setting: str = found.names["setting"]
        self._sampler = Sampler(
            found.sample_files(), found.settings, found.encoder, found.image_size, found.seed, device, self.setting
        )
        self.num_modes: int = self._sampler.source.num_modes
        self.num_labels: int = self._sampler.model.config.num_classes
        self.latent_shape, self.image_size = self._sampler.latent_shape, self._sampler.image_size

    def __repr__(self) -> str:
        modes = f", {self.num_modes} modes" if self.num_modes else ""
        name = f"{self._found.names['encoder']}, setting {self.setting}{modes}"
        return f"<mmfm.Model: {name}, images of {self.image_size} pixels, on {self.device}>"

    @cached_property
    def mixture(self) -> Mixture:
        """The mixture of the global tokens: ``posterior(tokens)``, ``sample(n)``, ``weights``, ``means``, ...

        Raises:
            ValueError: the setting has none.

        >>> model.mixture.posterior(model.encode(images).global_token).argmax(1).shape
        torch.Size([4])
        """
        if not self.num_modes:
            raise ValueError(f"the setting '{self.setting}' has a Gaussian source; open a target with a mixture")
        return Mixture.load(self._found.file("gmm"), self.device)

    @cached_property
    def detector(self) -> Detector:
        """The configured detector, for :func:`distance`."""
        kind, weights = self._found.detector()
        return load_detector(kind, weights, self.device)

    @cached_property
    def reference(self) -> Reference:
        """Moments of the real images' features in the configured detector, for :func:`distance`."""
        path, images = self._found.file("reference"), f"the images of '{self._found.target}'"
        listing = self._sampler.weights.get("listing_digest")
        return provenance.reference_for(path, self.detector, self.image_size, images, listing)

    @cached_property
    def _encoder(self) -> rae.RAE:
        about, folder = self._found.encoder, self._found.encoder_folder()
        encoder = load_encoder(about.family, folder, about.input_size, self.device)
        return rae.RAE(encoder, None, *rae.load_statistics(self._found.file("stats"), self.latent_shape))

    def encode(self, images: ImageInput) -> Encoded:
        """Encode images.

        Args:
            images: PIL images, which are resized and cropped as the training images were, or a tensor (n, 3, S, S),
                uint8 or float in [0, 1]; also a single image.

        Returns:
            latents (n, C, H, W), normalised, and global tokens (n, C); float32 on the model's device.

        Raises:
            ValueError: images of another shape, dtype or range.

        >>> latent, token = model.encode(images)
        >>> latent.shape == (4, *model.latent_shape) and token.shape == (4, model.latent_shape[0])
        True
        """
        parts = []
        for batch in pixels(images, self.image_size).split(self._sampler.settings.batch_size):
            is_uint8 = batch.dtype == torch.uint8
            parts.append(self._encoder.encode(data.to_float(batch, self.device) if is_uint8 else batch.to(self.device)))
        return Encoded(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def decode(self, latents: Tensor) -> Images:
        """Decode normalised latents, (n, C, H, W) or a single one, on any device.

        Raises:
            ValueError: latents of another shape, or values that are not finite.

        >>> model.decode(model.encode(images).latent)
        <4 images of 32 x 32 pixels>
        """
        latents = latents[None] if latents.ndim == 3 else latents
        if tuple(latents.shape[1:]) != self.latent_shape or not len(latents):
            wanted = ", ".join(map(str, self.latent_shape))
            raise ValueError(f"latents are {tuple(latents.shape)}; this model's are (n, {wanted}), at least one")
        if not latents.isfinite().all():
            raise ValueError("latents have NaN or Inf, which would become black images")
        parts = latents.split(self._sampler.settings.batch_size)
        return Images(torch.cat([self._sampler.generator.decode(part.to(self.device).float()).cpu() for part in parts]))

    def generate(
        self, n: int, *, seed: int | None = None, first: int = 0, modes: Numbers | None = None,
        labels: Numbers | None = None, progress: bool = True, **sampling: Unpack[Sampling],
    ) -> Images:  # fmt: skip
        """Generate images number ``first`` to ``first + n``: those of ``mmfm sample`` with the same seed and settings.

        Image i depends on the seed and i alone, so more images, or later ones, leave the others as they are: bit for
        bit in the same batches, and to rounding (now and then one level of a pixel) in others.

        Args:
            seed: of noise, modes and labels; None: that of the target.
            modes: where paths start, in [0, K), one for all or one for each; None: drawn. In the setting ``mode`` it is
                what the model sees, too.
            labels: classes in [0, L), one for all or one for each; None: drawn.
            progress: show a bar if it takes longer than a second.
            sampling: ``guidance``, ``solver``, ``time_points``, ...; see :class:`mmfm.generation.options.Sampling`.

        Raises:
            ValueError: settings that do not exist or that these weights can't do; modes or labels that do not exist.

        >>> images = model.generate(4)
        >>> images
        <4 images of 32 x 32 pixels>
        >>> images.tensor.shape, images.modes.shape
        (torch.Size([4, 3, 32, 32]), torch.Size([4]))
        >>> model.generate(4, seed=1, modes=3, solver="heun", time_points=4).modes.tolist()
        [3, 3, 3, 3]
        """
        sampler, fixed = self._asked(n, seed, modes, labels, sampling)
        own: list[Tensor] = []

        def start(batch: range) -> tuple[Tensor, VelocityFn]:
            drawn = _draw(sampler, batch, first, fixed)
            if drawn.modes is not None:
                own.append(drawn.modes)
            return sampler.source.draw(drawn.modes, drawn.noise), sampler.field(drawn.labels)

        tensor = batches.generate(sampler, range(first, first + n), start, progress)
        return Images(tensor, torch.cat(own) if own else None)

    def interpolate(
        self, n: int, *, seeds: tuple[int, int] | None = None, modes: tuple[int, int] | None = None,
        labels: tuple[int, int] | None = None, number: int = 0, progress: bool = True, **sampling: Unpack[Sampling],
    ) -> Images:  # fmt: skip
        """Generate n images on the way from one to another, both included.

        The ends are ``generate(1, seed=..., modes=..., labels=..., first=number)``. Between them noise moves on the
        sphere and the modes' means and standard deviations on straight lines; the velocities for two labels (in the
        setting ``mode`` the modes) are blended.

        Args:
            seeds: of the ends; None: the target's for both.
            modes: of the ends; None: those that are drawn.
            labels: classes of the ends; None: those that are drawn.
            number: of the image.
            progress, sampling: as in :meth:`generate`.

        Raises:
            ValueError: as in :meth:`generate`.

        >>> walk = model.interpolate(6, modes=(0, 3))
        >>> other = model.interpolate(6, seeds=(0, 1))
        """
        sampler, fixed = self._asked(2, None, modes, labels, sampling)
        ends = []
        for place, seed in enumerate(seeds or (sampler.seed, sampler.seed)):
            end, one = sampler.varied(sampler.settings, seed), range(number, number + 1)
            ends.append(_draw(end, one, number - place, fixed))
        shares = torch.linspace(0, 1, n, device=self.device)

        def start(batch: range) -> tuple[Tensor, VelocityFn]:
            return between(sampler.source, sampler.field, ends[0], ends[1], shares[batch.start : batch.stop])

        return Images(batches.generate(sampler, range(n), start, progress))

    def trajectory(
        self, n: int, *, seed: int | None = None, first: int = 0, modes: Numbers | None = None,
        labels: Numbers | None = None, **sampling: Unpack[Sampling],
    ) -> Trajectory:  # fmt: skip
        """Follow images from source to data and keep all states; arguments and errors as in :meth:`generate`.

        >>> path = model.trajectory(2)
        >>> path.states.shape == (len(path.times), 2, *model.latent_shape), path.straightness().shape
        (True, torch.Size([2]))
        >>> steps = model.decode(path.states[:, 0])
        """
        sampler, fixed = self._asked(n, seed, modes, labels, sampling)
        drawn = _draw(sampler, range(first, first + n), first, fixed)
        return trajectory(sampler.generator, sampler.field(drawn.labels), sampler.source.draw(drawn.modes, drawn.noise))

    def nearest_images(self, mode: int, n: int = 8) -> Images:
        """Return the training images of a mode that are likeliest under it, nearest first; all if it has fewer than n.

        Raises:
            ValueError: the mode does not exist or has no images, or the files do not belong together.

        >>> model.nearest_images(3, 2)
        <2 images of 32 x 32 pixels>
        """
        given(mode, 1, self.num_modes, "modes", self.device)
        places = {name: self._found.file(name) for name in ("listing", "tokens", "gmm", "assignment")}
        tokens, labels = TokenStore.open(places["tokens"]), provenance.labels(places["assignment"])
        provenance.belong_together(
            provenance.listing(places["listing"]), provenance.tokens(tokens),
            provenance.mixture(places["gmm"], self.mixture), provenance.assignment(places["assignment"]),
        )  # fmt: skip
        if not (labels == mode).any():
            raise ValueError(f"mode {mode} has no images; take another one")
        block, listing = 16 * tokens.tokens.chunks[0], data.Listing.open(places["listing"])
        numbers = contact_sheet.nearest_images(tokens.read, labels, self.mixture, [mode], block, n)[mode].tolist()
        read = [data.read_image(listing.path(number)) for number in numbers]
        return Images(pixels(read, self.image_size), torch.full((len(read),), mode))

    def _asked(
        self, n: int, seed: int | None, modes: Numbers | None, labels: Numbers | None, sampling: Sampling
    ) -> tuple[Sampler, _Fixed]:
        """Return a sampler of the settings asked for, and the modes and classes (n,) that are not to be drawn."""
        sampler = self._sampler.varied(changed(self._sampler.settings, sampling), seed)
        classes = self.num_labels if sampler.setting.condition == "class" else 0
        fixed = (
            given(modes, n, self.num_modes, "modes", self.device),
            given(labels, n, classes, "labels", self.device),
        )
        return sampler, fixed


def distance(a: ImageInput, b: ImageInput | Reference, detector: Detector, batch_size: int = 250) -> float:
    """Return the squared Frechet distance between two sets of images in a detector's features.

    Args:
        a: images of one size, at least 2; with fewer images than the detector has features it is far too large.
        b: other images, or ``model.reference``, the real ones.
        detector: ``model.detector``, or one of :func:`load_detector`.
        batch_size: images per call of the detector.

    Raises:
        ValueError: fewer than two images, images that the detector does not take, or a reference of another detector.

    >>> there_and_back = model.decode(model.encode(images).latent)
    >>> mmfm.distance(images, there_and_back, model.detector) > 0
    True
    """
    moments = [_moments(each, detector, batch_size) for each in (a, b)]
    return frechet_distance(*moments[0], *moments[1])


def _moments(images: ImageInput | Reference, detector: Detector, batch_size: int) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) of features, float64."""
    if isinstance(images, Reference):
        if images.about["detector_digest"] != detector.digest:
            raise ValueError(f"the reference is of another detector ({images.about['detector']}) than {detector.name}")
        return torch.tensor(images.mu), torch.tensor(images.sigma)
    moments = CovarianceMoments.zeros(detector.dimension, detector.device)
    for batch in pixels(images).split(batch_size):
        moments.update(detector.features(batch if batch.dtype == torch.uint8 else rae.to_uint8(batch)))
    return moments.mean, moments.covariance()


def _draw(sampler: Sampler, batch: range, first: int, fixed: _Fixed) -> Draw:
    """Draw a batch; row 0 of the fixed modes and labels belongs to image ``first``."""
    rows = slice(batch.start - first, batch.stop - first)
    return sampler.generator.draw(batch, *(None if each is None else each[rows] for each in fixed))
