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

    Source: FDr^k in Yang et al. 2026, "Representation Fréchet loss for visual generation", for k encoders.
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
        ValueError: a file is no such result, the images differ, a detector is there twice or has no floor, or a floor
            is of another reference; also see :func:`mean_ratio`.
    """
    try:
        if len({_images(result) for result in results}) > 1:
            raise ValueError("the results are of different images; give those of the same images")
        distances: dict[str, float] = {}
        known: dict[str, float] = {}
        held_out = {(each["detector"]["digest"], each["reference"]["digest"]): each for each in floors}
        for result in results:
            name = result["detector"]["name"]
            if name in distances:
                raise ValueError(f"two results have the detector {name}; give one for each detector")
            distances[name] = _distance(result)
            other = held_out.get((result["detector"]["digest"], result["reference"]["digest"]))
            floor = _distance(other) if other else result.get("floor")
            if floor is None:
                raise ValueError(
                    f"the distance of held-out real images is unknown for {name} and its reference; set data.holdout, "
                    "or score held-out images with 'mmfm evaluate' and give the result with --floors"
                )
            known[name] = float(floor)
        ratios = {name: distances[name] / known[name] for name in distances if known[name] > 0}
        value = mean_ratio(distances, known)
        return {"stage": "fdr", "fdr": value, "ratios": ratios, "distances": distances, "floors": known}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a file is not a result of fid or of 'mmfm evaluate' ({error!r}); make it again") from error


def _images(result: Mapping[str, Any]) -> str:
    samples = result["samples"]
    return str(samples["images_digest"] if "images_digest" in samples else samples["digest"])


def _distance(result: Mapping[str, Any]) -> float:
    return float(result["frechet_distance"] if "frechet_distance" in result else result["metrics"]["frechet"])


def render(found: Mapping[str, Any]) -> str:
    """Return the result of :func:`collect` as text."""
    width = max(map(len, found["ratios"])) + 2
    rows = [
        f"{name:<{width}}{ratio:.4f}  ({found['distances'][name]:.4f} against {found['floors'][name]:.4f})"
        for name, ratio in found["ratios"].items()
    ]
    return f"FDr, mean ratio over {len(rows)} detectors: {found['fdr']:.4f}\n\n" + "\n".join(rows) + "\n"
