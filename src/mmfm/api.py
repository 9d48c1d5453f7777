"""The Python API: open a finished target; generate, interpolate, encode, decode and compare images.

All names are available from ``import mmfm``, which imports PyTorch only when one of them is used. The guide is
docs/python.md.
"""

from functools import cached_property
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from mmfm import data
from mmfm.autoencoder import rae
from mmfm.autoencoder.encoders import configured_encoder
from mmfm.autoencoder.rae import Encoded
from mmfm.data.moments import CovarianceMoments
from mmfm.data.tokens import TokenStore
from mmfm.evaluation import contact_sheet
from mmfm.evaluation.detector import Detector, load_detector
from mmfm.evaluation.frechet import frechet_distance
from mmfm.evaluation.reference import Reference
from mmfm.generation import batches
from mmfm.generation.images import ImageInput, Images, pixels
from mmfm.generation.options import Numbers, Request, Sampling, given, numbers
from mmfm.generation.sampler import Sampler
from mmfm.generation.trajectory import Trajectory, trajectory
from mmfm.infra.distributed import named_device
from mmfm.mixture.gaussian import Mixture
from mmfm.stages import provenance
from mmfm.workflow import description
from mmfm.workflow.finished import Finished

__all__ = ["Detector", "Encoded", "Images", "Mixture", "Model", "Trajectory", "distance", "load_detector", "open"]


def open(target: str | Path, device: torch.device | str | None = None) -> "Model":
    """Open a finished target: a result, a sample set or trained weights.

    The model samples as the target was sampled; trained weights are sampled as configured in the last run of the
    workflow.

    Args:
        target: ``results/fid/NAME.txt``, ``results/sample/NAME/VARIANT`` or ``results/train/NAME/VARIANT``.
        device: where to compute, for example ``"cuda:1"``. None: a GPU if there is one, else the CPU.

    Raises:
        FileNotFoundError: the target or a file that it was made from is missing; the message names the file and the
            command that makes it.
        ValueError: the path is not a finished target, a file was made again since, or PyTorch can't use the device.

    >>> model = mmfm.open("results/fid/dinov2_mode.txt", device="cpu")
    >>> model
    <mmfm.Model: dinov2, setting mode, ... modes, images of 32 pixels, on cpu>
    """
    chosen = named_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Model(description.read(target), chosen)


class Model:
    """A trained model with its encoder, decoder and mixture, opened by :func:`open`.

    Attributes:
        setting: ``uncond``, ``gmm``, ``mode``, ``class`` or ``class_gmm``.
        num_modes: K, the number of modes of the source; 0 for a Gaussian source.
        num_labels: number of modes or classes that the model is conditioned on; 0 for an unconditional model.
        latent_shape: (C, H, W).
        image_size: side S of the images, in pixels.
        device: where the model computes.
    """

    def __init__(self, found: Finished, device: torch.device) -> None:
        self._found, self.device = found, device
        self.setting: str = found.names["setting"]
        self._sampler = Sampler(
            found.sample_files(), found.sample, found.encoder, found.image_size, found.seed, device, self.setting
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
        """The mixture of the global tokens, with ``weights``, ``means``, ``posterior(tokens)``, ``sample(n)``, ...

        Raises:
            ValueError: the setting has no mixture.

        >>> model.mixture.posterior(model.encode(images).global_token).argmax(1).shape
        torch.Size([4])
        """
        if not self.num_modes:
            raise ValueError(f"setting '{self.setting}' has a Gaussian source; open a target with a mixture")
        return Mixture.load(self._found.file("gmm"), self.device)

    @cached_property
    def detector(self) -> Detector:
        """The detector of the target's configuration, for :func:`distance`."""
        kind, weights = self._found.detector()
        return load_detector(kind, weights, self.device)

    @cached_property
    def reference(self) -> Reference:
        """The reference, moments of the real images' features in :attr:`detector`, for :func:`distance`."""
        path, images = self._found.file("reference"), f"the images of '{self._found.target}'"
        listing = self._sampler.weights.get("listing_digest")
        return provenance.reference_for(path, self.detector, self.image_size, images, listing)

    @cached_property
    def _encoder(self) -> rae.RAE:
        section, folder = self._found.encoder, self._found.encoder_folder()
        encoder = configured_encoder(section, folder, self.device)
        return rae.RAE(encoder, None, *rae.load_statistics(self._found.file("stats"), self.latent_shape))

    def encode(self, images: ImageInput) -> Encoded:
        """Encode images to latents and global tokens.

        Args:
            images: one image or several: PIL images, which are resized and cropped like the training images, or a
                tensor (n, 3, S, S), uint8 or float in [0, 1].

        Returns:
            ``latent`` (n, C, H, W), normalised, and ``global_token`` (n, C), float32 on the model's device.

        Raises:
            ValueError: the images have the wrong type, shape, dtype or range.

        >>> latent, token = model.encode(images)
        >>> latent.shape == (4, *model.latent_shape) and token.shape == (4, model.latent_shape[0])
        True
        """
        parts = []
        for batch in pixels(images, self.image_size).split(self._sampler.config.batch_size):
            is_uint8 = batch.dtype == torch.uint8
            parts.append(self._encoder.encode(data.to_float(batch, self.device) if is_uint8 else batch.to(self.device)))
        return Encoded(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def decode(self, latents: Tensor) -> Images:
        """Decode latents to images.

        Args:
            latents: (n, C, H, W) or (C, H, W), normalised as :meth:`encode` returns them, on any device.

        Raises:
            ValueError: the latents have the wrong shape, or contain NaN or Inf.

        >>> model.decode(model.encode(images).latent)
        <4 images of 32 x 32 pixels>
        """
        latents = latents[None] if latents.ndim == 3 else latents
        if tuple(latents.shape[1:]) != self.latent_shape or not len(latents):
            wanted = ", ".join(map(str, self.latent_shape))
            raise ValueError(f"latents are {tuple(latents.shape)}; this model's are (n, {wanted}), at least one")
        if not latents.isfinite().all():
            raise ValueError("latents contain NaN or Inf, which would decode to black images")
        parts = latents.split(self._sampler.config.batch_size)
        return Images(torch.cat([self._sampler.generator.decode(part.to(self.device).float()).cpu() for part in parts]))

    def generate(
        self,
        n: int,
        *,
        seed: int | None = None,
        first: int = 0,
        modes: Numbers | None = None,
        labels: Numbers | None = None,
        progress: bool = True,
        **sampling: Unpack[Sampling],
    ) -> Images:
        """Generate n images, numbers ``first`` to ``first + n - 1``.

        These are the images that ``mmfm sample`` makes with the same seed and options. Image i depends only on the
        seed and i, not on n or ``first``: it is identical bit for bit if generated in the same batches, and otherwise
        equal up to rounding (an occasional pixel differs by one level).

        Args:
            seed: of noise, modes and labels. None: the target's seed.
            modes: modes of the source to start from, in [0, K): one for all images or one for each. None: draw them.
                In the setting ``mode`` the model is conditioned on them too.
            labels: classes, in [0, L): one for all images or one for each. None: draw them.
            progress: show a progress bar if generation takes longer than a second.
            sampling: sampling options to change, for example ``guidance``, ``solver`` or ``time_points``; see
                :class:`mmfm.generation.options.Sampling`. The others are the target's.

        Raises:
            ValueError: an option, mode or label does not exist or is not possible with these weights, or a number is
                not whole.

        >>> images = model.generate(4)
        >>> images
        <4 images of 32 x 32 pixels>
        >>> images.tensor.shape, images.modes.shape
        (torch.Size([4, 3, 32, 32]), torch.Size([4]))
        >>> model.generate(4, seed=1, modes=3, solver="heun", time_points=4).modes.tolist()
        [3, 3, 3, 3]
        """
        request = Request.of(self._sampler, numbers(n, first), sampling, seed, modes, labels)
        return batches.generate(request, progress)

    def interpolate(
        self,
        n: int,
        *,
        seeds: tuple[int, int] | None = None,
        modes: tuple[int, int] | None = None,
        labels: tuple[int, int] | None = None,
        number: int = 0,
        progress: bool = True,
        **sampling: Unpack[Sampling],
    ) -> Images:
        """Generate n images that interpolate between two images, both included.

        The two images are ``generate(1, seed=seeds[i], modes=modes[i], labels=labels[i], first=number)`` for i = 0, 1.
        Noise is interpolated spherically, the means and standard deviations of the modes linearly. Labels (in the
        setting ``mode`` the modes) are discrete, so the velocities for the two labels are interpolated linearly.

        Args:
            n: number of images; 1 gives only the first of the two.
            seeds: of the two images. None: the target's seed for both.
            modes: of the two images. None: draw them.
            labels: classes of the two images. None: draw them.
            number: number of both images.
            progress, sampling: as in :meth:`generate`.

        Raises:
            ValueError: as in :meth:`generate`.

        >>> walk = model.interpolate(6, modes=(0, 3))
        >>> other = model.interpolate(6, seeds=(0, 1))
        """
        drawn, one, n = (None, None), numbers(1, number), len(numbers(n))
        start, end = (
            Request.of(self._sampler, one, sampling, seed, mode, label)
            for seed, mode, label in zip(seeds or drawn, modes or drawn, labels or drawn, strict=True)
        )
        return batches.interpolate(start, end, n, progress)

    def trajectory(
        self,
        n: int,
        *,
        seed: int | None = None,
        first: int = 0,
        modes: Numbers | None = None,
        labels: Numbers | None = None,
        **sampling: Unpack[Sampling],
    ) -> Trajectory:
        """Generate n images in one batch and return their latents at every time point, from source to data.

        Arguments and errors are those of :meth:`generate`; ``time_points`` must be at least 2.

        >>> path = model.trajectory(2)
        >>> path.states.shape == (len(path.times), 2, *model.latent_shape), path.straightness().shape
        (True, torch.Size([2]))
        >>> steps = model.decode(path.states[:, 0])
        """
        request = Request.of(self._sampler, numbers(n, first), sampling, seed, modes, labels)
        sampler, drawn = request.sampler, request.draw(request.numbers)
        return trajectory(sampler.generator, sampler.field(drawn.labels), sampler.source.draw(drawn.modes, drawn.noise))

    def nearest_images(self, mode: int, n: int = 8) -> Images:
        """Return the n training images of a mode with the highest density under it, highest first.

        Fewer are returned if the mode has fewer images. Reads the training images, their tokens and the assignment.

        Raises:
            FileNotFoundError: one of these files is missing.
            ValueError: the mode does not exist or has no images, or the files do not match.

        >>> model.nearest_images(3, 2)
        <2 images of 32 x 32 pixels>
        """
        given(mode, 1, self.num_modes, "modes")
        files = {name: self._found.file(name) for name in ("listing", "tokens", "gmm", "assignment")}
        tokens, assignment = TokenStore.open(files["tokens"]), provenance.labels(files["assignment"])
        provenance.belong_together(
            provenance.listing(files["listing"]),
            provenance.tokens(tokens),
            provenance.mixture(files["gmm"], self.mixture),
            provenance.assignment(files["assignment"]),
        )
        if not (assignment == mode).any():
            raise ValueError(f"mode {mode} has no images; choose another one")
        block, listing = 16 * tokens.tokens.chunks[0], data.Listing.open(files["listing"])
        nearest = contact_sheet.nearest_images(tokens.read, assignment, self.mixture, [mode], block, n)[mode]
        images = [data.read_image(listing.path(number)) for number in nearest.tolist()]
        return Images(pixels(images, self.image_size), torch.full((len(images),), mode))


def distance(a: ImageInput, b: ImageInput | Reference, detector: Detector, batch_size: int = 250) -> float:
    """Return the squared Frechet distance between two sets of images; with Inception as the detector, the FID.

    With fewer images than the detector has features, the distance is far too large.

    Args:
        a: at least 2 images, all of the same size.
        b: other images, or ``model.reference`` for the real images.
        detector: ``model.detector``, or a detector from :func:`load_detector`.
        batch_size: images per call of the detector.

    Raises:
        ValueError: fewer than 2 images, images that the detector cannot process, or a reference of another detector.

    >>> there_and_back = model.decode(model.encode(images).latent)
    >>> mmfm.distance(images, there_and_back, model.detector) > 0
    True
    """
    moments = [_moments(each, detector, batch_size) for each in (a, b)]
    return frechet_distance(*moments[0], *moments[1])


def _moments(images: ImageInput | Reference, detector: Detector, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and unbiased covariance (D, D) of the features, float64."""
    if isinstance(images, Reference):
        if images.about["detector_digest"] != detector.digest:
            raise ValueError(
                f"the reference belongs to the detector {images.about['detector']}, not to {detector.name}; pass "
                "model.detector"
            )
        return torch.tensor(images.mu), torch.tensor(images.sigma)
    moments = CovarianceMoments.zeros(detector.dimension, detector.device)
    for batch in pixels(images).split(batch_size):
        moments.update(detector.features(batch if batch.dtype == torch.uint8 else rae.to_uint8(batch)))
    return moments.mean, moments.covariance()
