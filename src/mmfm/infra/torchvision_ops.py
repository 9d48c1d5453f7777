"""Make ``import torchvision`` work with a PyTorch build that it was not compiled for.

A CPU-only PyTorch is often combined with the default torchvision wheel. Its compiled extension then fails to load, and
``import torchvision`` raises ``operator torchvision::nms does not exist``, which also breaks torch-fidelity and
transformers. The missing operators are never called here, so it suffices to declare their schemas.

Import this module before anything that imports torchvision. It does nothing if torchvision works.
"""

import sys

import torch

# Kept alive, because the operators disappear when the library is garbage-collected.
_declared: torch.library.Library | None = None


def ensure_importable() -> bool:
    """Import torchvision; if that fails, declare the missing operators and try again.

    Returns:
        Whether the operators had to be declared.

    Raises:
        RuntimeError: torchvision cannot be imported for another reason.
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
