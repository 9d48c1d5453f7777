"""FDr: how far generated images are from the reference, in several detectors' features at once.

Nothing here imports PyTorch.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def mean_ratio(distances: Mapping[str, float], floors: Mapping[str, float]) -> float:
    """Return FDr: the mean over encoders of the distance of generated images by that of held-out real ones.

    1 means as close to the reference as real images in every encoder's features. The ratios have no scale, so that an
    encoder with large features does not decide.

    Args:
        distances: squared Fréchet distance of generated images from the reference, by encoder.
        floors: that of held-out real images from the same references; their number should be that of the generated
            images, because fewer give a larger distance.

    Raises:
        ValueError: no encoder, other encoders in one than in the other, or a floor that is not positive.

    Source: FDr^k in Yang et al. 2026, "Representation Fréchet loss for visual generation", for k encoders, and the
    evaluation code of its authors, whose held-out images are ImageNet's validation set.
    """
    if not distances or distances.keys() != floors.keys():
        raise ValueError(
            f"distances are in features of {', '.join(distances) or 'none'}, floors in those of "
            f"{', '.join(floors) or 'none'}; give both for the same encoders"
        )
    for name, floor in floors.items():
        if not floor > 0:
            raise ValueError(f"held-out images are at distance {floor} in {name}; make the reference with other images")
    return sum(distances[name] / floors[name] for name in distances) / len(distances)


def collect(results: Sequence[Mapping[str, Any]], floors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return FDr of some images as JSON values.

    Args:
        results: results of the stage `fid` or of `mmfm evaluate`, of the same images with a detector each.
        floors: results of `mmfm evaluate` of held-out real images, for the detectors whose result has no floor.

    Raises:
        ValueError: a file is no such result, the images differ, a detector is there twice, has no floor or two, or a
            floor is of another reference or of a detector without result; also see :func:`mean_ratio`.
    """
    try:
        for result in (*results, *floors):
            if _kind(result) == "evaluate" and "frechet" not in result["metrics"]:
                raise ValueError("a result has no Frechet distance; score with --metrics frechet")
        if len({(_kind(each), _images(each)) for each in results}) > len({_kind(each) for each in results}):
            raise ValueError("the results are of different images; give those of the same images")
        distances: dict[str, float] = {}
        known: dict[str, float] = {}
        warnings = []
        held_out = {each["detector"]["digest"]: each for each in floors}
        for result in results:
            name = result["detector"]["name"]
            if name in distances:
                raise ValueError(f"two results have the detector {name}; give one for each detector")
            distances[name] = _distance(result)
            known[name], n = _floor(result, held_out.pop(result["detector"]["digest"], None))
            if n != (images := _number(result)):
                warnings.append(
                    f"{name}: {images:,} generated images, but {n:,} held-out ones; the fewer, the larger a distance"
                )
        if held_out:
            left = ", ".join(each["detector"]["name"] for each in held_out.values())
            raise ValueError(f"there is no result for the detector of a floor: {left}; leave the floor out")
        value = mean_ratio(distances, known)
        ratios = {name: distances[name] / known[name] for name in distances}
        return {
            "stage": "fdr", "fdr": value, "ratios": ratios, "distances": distances, "floors": known,
            "warnings": warnings,
        }  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a file is not a result of fid or of 'mmfm evaluate' ({error!r}); make it again") from error


def _floor(result: Mapping[str, Any], other: Mapping[str, Any] | None) -> tuple[float, int]:
    """Return the distance of held-out images from a result's reference, and their number."""
    name = result["detector"]["name"]
    if other is None:
        if result.get("floor") is None:
            raise ValueError(
                f"the distance of held-out real images is unknown for {name} and its reference; set data.holdout or "
                "data.heldout_root, or score held-out images with 'mmfm evaluate' and give the result with --floors"
            )
        return float(result["floor"]), int(result["floor_n_images"])
    if result.get("floor") is not None:
        raise ValueError(f"the result for {name} has a floor already; leave that of --floors out")
    # The stage `fid` and `mmfm evaluate` have other digests of a reference: of what it holds, and of its file.
    if _kind(result) == _kind(other) and result["reference"]["digest"] != other["reference"]["digest"]:
        raise ValueError(f"the floor for {name} is of another reference than the result; score both with one reference")
    return _distance(other), _number(other)


def _kind(result: Mapping[str, Any]) -> str:
    return "fid" if "frechet_distance" in result else "evaluate"


def _images(result: Mapping[str, Any]) -> str:
    return str(result["samples"]["images_digest" if _kind(result) == "fid" else "digest"])


def _number(result: Mapping[str, Any]) -> int:
    return int(result["samples"]["n_images"])


def _distance(result: Mapping[str, Any]) -> float:
    return float(result["frechet_distance"] if _kind(result) == "fid" else result["metrics"]["frechet"])


def render(found: Mapping[str, Any]) -> str:
    """Return the result of :func:`collect` as text."""
    width = max(map(len, found["ratios"])) + 2
    rows = [
        f"{name:<{width}}{ratio:.4f}  ({found['distances'][name]:.4f} against {found['floors'][name]:.4f})"
        for name, ratio in found["ratios"].items()
    ]
    rows += ["", *(f"WARNING: {warning}" for warning in found["warnings"])] if found["warnings"] else []
    count = len(found["ratios"])
    head = f"FDr, mean ratio over {count} detector{'s' * (count != 1)}: {found['fdr']:.4f}"
    return "\n".join([head, "", *rows]) + "\n"
