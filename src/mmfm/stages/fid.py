"""``fid``: measure the Frechet distance of generated images from the reference, and the other metrics asked for.

Reads: ``images.npz`` (memory-mapped), ``samples.json``, the detector and the reference.
Writes: the result as text (``.txt``) and as JSON (``.json``), with all that is needed to interpret it.
Unit of work: none; there is nothing to resume.
After a kill: no output.
"""

from pathlib import Path
from typing import Any

from mmfm.config import STAGES, Fid, StageConfig
from mmfm.config.choices import METRICS
from mmfm.config.keys import keys_of_kind
from mmfm.evaluation import scores
from mmfm.evaluation.detector import Detector
from mmfm.evaluation.features import image_statistics, sampled_features
from mmfm.evaluation.reference import Reference
from mmfm.infra import store, versions
from mmfm.infra.distributed import Ranks
from mmfm.stages import provenance


def fid(
    config: StageConfig, detector: Detector, images: Path, samples: Path, reference: Path, out_txt: Path,
    out_json: Path, ranks: Ranks,
) -> dict[str, Any]:  # fmt: skip
    """Measure generated images, write the result and return it on every process; see :func:`measure`."""
    result = measure(images, samples, reference, detector, config.fid, ranks)
    ranks.from_main(lambda: write_result(result, out_txt, out_json))
    return result


def measure(
    images_path: Path, samples_path: Path, reference_path: Path, detector: Detector, section: Fid, ranks: Ranks
) -> dict[str, Any]:
    """Return the metrics and how they were measured as JSON values, the same on every process.

    Args:
        images_path: ``images.npz`` from sample, (n, S, S, 3) uint8.
        samples_path: ``samples.json`` from sample, which describes these images.
        reference_path: reference from fid_reference.
        section: says which metrics, and the images per call of the detector.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the reference was made with another detector or image size, or lacks what a metric needs;
            ``samples.json`` describes other images; or there are fewer than two images, or all are alike.
    """
    images, samples = provenance.generated(images_path, samples_path)
    if len(images) < 2:
        raise ValueError(
            f"'{images_path}' holds {len(images)} image, a covariance needs at least 2: raise sample.n_images"
        )
    noun = f"the images in '{images_path}'"
    reference = provenance.reference_for(reference_path, detector, images.shape[1], noun)
    scores.require(section.metrics, reference.statistics(), "reference")
    digest = ranks.from_main(lambda: provenance.described(images, images_path, samples, samples_path))
    features = sampled_features(images_path, digest, detector)
    kinds = scores.kinds(section.metrics)
    part = image_statistics(images, kinds, detector, section.batch_size, ranks, features)
    taken = features is not None and part.needs_features_only
    statistics = part.of_all(ranks)

    def computed() -> tuple[dict[str, float], list[str]]:
        assert statistics is not None  # on the main process
        values = scores.scores(section.metrics, statistics, reference.statistics(), ranks.device)
        warnings = _warnings(detector, reference, samples) + scores.cautions(
            section.metrics, statistics, reference.statistics(), published=detector.standard
        )
        return values, warnings

    values, warnings = ranks.from_main(computed)
    n, distance = len(images), values.pop("frechet")
    return {
        "stage": "fid",
        "version": STAGES["fid"].version,
        "measure": _measure_name(detector, n),
        "frechet_distance": distance,
        **({"metrics": values, "settings": scores.SETTINGS} if values else {}),
        "published_protocol": detector.standard
        and reference.about["n_images"] is None
        and n == scores.PUBLISHED_IMAGES,
        "warnings": warnings,
        "n_images": n,
        "floor": reference.about["floor"],
        "floor_n_images": reference.about["floor_n_images"],
        "features": "from sample" if taken else "computed",
        "detector": {"name": detector.name, "digest": detector.digest, "dimension": detector.dimension},
        "reference": {name: reference.about[name] for name in ("source", "n_images", "image_size", "digest")},
        "samples": samples,
        "configuration_digest": _configuration(section, samples, detector, reference),
        "versions": versions.installed(),
    }


def _configuration(section: Fid, samples: dict[str, Any], detector: Detector, reference: Reference) -> str:
    """Return a digest of all that determines the numbers: equal ones are repetitions of the same measurement."""
    described = {name: value for name, value in samples.items() if name not in ("seconds", "straightness")}
    return store.fingerprint([keys_of_kind(section, "identity"), described, detector.digest, reference.about["digest"]])


def _measure_name(detector: Detector, n: int) -> str:
    if detector.encoder_digest is not None:
        return "Frechet distance of encoder tokens (not an FID)"
    if not detector.standard:
        return "Frechet distance (not an FID)"
    return "FID-50K" if n == scores.PUBLISHED_IMAGES else f"FID with {n:,} images"


def _warnings(detector: Detector, reference: Reference, samples: dict[str, Any]) -> list[str]:
    lines = []
    if detector.encoder_digest is not None and detector.encoder_digest == samples.get("inputs", {}).get("encoder"):
        lines.append(
            "The features are those of the generator's own encoder, in which its mixture was fitted; this favours "
            "settings with a mixture. Name a second encoder in fid.encoder for a fairer comparison."
        )
    if not detector.standard:
        lines.append(
            "This number is NOT an ImageNet FID and can't be compared with any published FID. Compare it only with "
            "numbers for the same detector, reference and number of images: fewer images give larger distances."
        )
    elif reference.about["n_images"] is not None:
        lines.append(
            f"The reference is {reference.about['source']}. Published FIDs on ImageNet use ADM's "
            "VIRTUAL_imagenet256_labeled.npz; set fid.reference to that file to compare."
        )
    return lines


def write_result(result: dict[str, Any], out_txt: str | Path, out_json: str | Path) -> None:
    """Write the result as text and as JSON."""
    with store.whole_file(out_txt) as partial:
        partial.write_text(render(result), encoding="utf-8")
    store.write_json(out_json, result)


def render(result: dict[str, Any]) -> str:
    """Return the result of :func:`measure` as text."""
    samples, detector = result["samples"], result["detector"]
    lines = [f"{result['measure']}: {result['frechet_distance']:.4f}", f"detector: {detector['name']}"]
    lines += [f"WARNING: {warning}" for warning in result["warnings"]]
    rows = {
        **_metric_rows(result.get("metrics", {})),
        "floor": _floor(result),
        "reference": result["reference"]["source"],
        "images": f"{result['n_images']:,} of {samples['image_size']} x {samples['image_size']} pixels",
        "seed": samples["seed"],
        "setting": samples["setting"]
        + (f", {samples['n_modes']} modes, {samples['mode_draw']}" if samples["mode_draw"] else "")
        + (f", {samples['n_labels']} classes, {samples['label_draw']}" if samples.get("label_draw") else ""),
        "sampler": _sampler(samples),
        "guidance": _guidance(samples["guidance"]),
        "weights": _weights(samples["weights"]),
        "encoder": _encoder(samples["encoder"]),
        "detector weights": f"sha256 {detector['digest']}",
        "images digest": f"sha256 {samples['images_digest']}",
        "reference digest": f"sha256 {result['reference']['digest']}",
        "configuration": f"digest {result['configuration_digest']}",
        "versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
    }
    width = max(map(len, rows)) + 2
    return "\n".join([*lines, "", *(f"{name:<{width}}{value}" for name, value in rows.items())]) + "\n"


def _metric_rows(metrics: dict[str, float]) -> dict[str, str]:
    """Return a line for each metric; a deviation stands behind its mean."""
    rows = {}
    for name, value in metrics.items():
        if name in METRICS:
            spread = f" +- {metrics[f'{name}_std']:.4g}" if f"{name}_std" in metrics else ""
            rows[METRICS[name].title] = f"{value:.4f}{spread}"
    return rows


def _floor(result: dict[str, Any]) -> str:
    if result["floor"] is None:
        return "unknown (no held-out images)"
    n = result["floor_n_images"]
    return f"{result['floor']:.4f} (distance of {n:,} held-out real images from the reference; fewer give a larger one)"


def _sampler(samples: dict[str, Any]) -> str:
    if samples["source_only"]:
        return "none: the decoded source itself, without the model (0 function evaluations)"
    return (
        f"{samples['solver']}, {samples['time_points']} time points from t = {samples['first_time']:g} to "
        f"{samples['last_time']:.4f}, {samples['function_evaluations']:g} function evaluations, network in "
        f"{samples['precision']} on {samples['device']}" + (f", {how}" if (how := samples.get("quantisation")) else "")
    )


def _guidance(guidance: dict[str, Any] | None) -> str:
    if guidance is None:
        return "none"
    low, high = guidance.get("interval", (0.0, 1.0))
    text = f"{guidance['kind']}, scale {guidance['scale']:g}, for {low:g} <= t <= {high:g}"
    return text if guidance["guide"] is None else f"{text}, guide: {_weights(guidance['guide'])}"


def _weights(weights: dict[str, Any]) -> str:
    epochs = "unknown" if weights["epochs"] is None else f"{weights['epochs']:g}"
    step = "unknown" if weights["step"] is None else f"{weights['step']:,}"
    return f"EMA at step {step}, {epochs} epochs, training seed {weights['seed']}, sha256 {weights['digest']}"


def _encoder(encoder: Any) -> str:
    return (
        ", ".join(f"{name} {value}" for name, value in encoder.items()) if isinstance(encoder, dict) else str(encoder)
    )
