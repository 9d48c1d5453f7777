"""Make ``import torchvision`` work beside a PyTorch build that it was not compiled against.

A CPU-only PyTorch next to the default torchvision wheel is a common mix. torchvision's compiled extension then does not
load, and its Python code fails on import with ``operator torchvision::nms does not exist``, which takes timm,
torch-fidelity and every transformers model with it. None of them calls the missing operators here, so declaring their
schemas is enough.

Import this module before anything that imports torchvision. It does nothing where torchvision is whole.
"""

import sys

import torch

# The library must outlive the imports: its operators vanish when it is garbage-collected.
_declared: torch.library.Library | None = None


def ensure_importable() -> bool:
    """Import torchvision, declaring the operators it misses if that fails.

    Returns:
        True if the operators had to be declared, False if torchvision imported as it is.

    Raises:
        RuntimeError: torchvision fails to import for another reason.
    """
    global _declared
    try:
        import torchvision

        return False
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _declared is not None:
            raise
    for name in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
        del sys.modules[name]
    _declared = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        _declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401

    return True


ensure_importable()
