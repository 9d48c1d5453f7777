"""Rehearsals: the code at its real sizes on the meta device, where tensors have shapes and dtypes but no memory.

What a GPU would make slow or impossible fails here: an operation that waits for the device, tensors of two devices in
one operation, a product in float64 or, under autocast, in float32. Values do not exist, so a wait that is meant needs
an answer; see :class:`Wait`.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmfm
from mmfm import config
from mmfm.mixture import groups
from mmfm.models.dit import DiT
from mmfm.training import setup
from mmfm.training.objective import FlowMatching

META = torch.device("meta")
SHAPE, IMAGES, CLASSES = (768, 16, 16), 1_281_167, 1000
"""ImageNet at 256 x 256: a latent, the training images, the classes."""

_PACKAGE = Path(mmfm.__file__).parent
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_attention_math", "convolution")


class InBf16(TorchDispatchMode):
    """Requires that products have operands in bfloat16, and that nothing is in float64.

    For CPU tensors under FakeTensorMode, because the meta device has no autocast.

    Attributes:
        products: how often each kind of product was seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        made, name = operation(*arguments, **(keywords or {})), operation.overloadpacket.__name__
        operands = [value for value in tree_leaves((arguments, keywords)) if isinstance(value, Tensor)]
        if any(
            tensor.dtype == torch.float64 for tensor in (*operands, *tree_leaves(made)) if isinstance(tensor, Tensor)
        ):
            raise AssertionError(f"{place()}: {name} in float64, for which GPUs are slow")
        if name in _PRODUCTS or name.startswith("_scaled_dot_product"):
            self.products[name] += 1
            # Attention keeps sums of exponentials in float32 for its backward pass, after queries, keys and values.
            if {tensor.dtype for tensor in operands[:3]} != {torch.bfloat16}:
                raise AssertionError(
                    f"{place()}: {name} of {[str(tensor.dtype) for tensor in operands]} under autocast"
                )
        return made


class Wait(NamedTuple):
    """Why code may wait for the device at one place, and what the host reads there.

    Attributes:
        reason: why the wait is harmless.
        answer: value of every number that is copied to the host, or how many rows an operation of unknown length
            finds; several are given in turn.
    """

    reason: str
    answer: int | tuple[int, ...] = 0


class Waits(AssertionError):
    """The host would wait for the device at a place that is not on the list."""


class Rehearsal(TorchDispatchMode):
    """Stands in for a GPU while operations run on the meta device.

    Args:
        allowed: the waits that are meant, by place: module and function in the package.
        double: whether products in float64 are meant.

    Attributes:
        seen: how often the host waited at each place.
    """

    def __init__(self, allowed: Mapping[str, Wait] | None = None, double: bool = False) -> None:
        super().__init__()
        self.allowed, self.double = dict(allowed or {}), double
        self.seen: dict[str, int] = {}

    def __exit__(self, kind: Any, *rest: Any) -> None:
        super().__exit__(kind, *rest)
        if kind is None and (unused := self.allowed.keys() - self.seen.keys()):
            raise AssertionError(f"nothing waits in {sorted(unused)} any more: take them off the list")

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords, name = keywords or {}, operation.overloadpacket.__name__
        tensors = [value for value in tree_leaves((arguments, keywords)) if isinstance(value, Tensor)]
        here = {tensor.device.type for tensor in tensors if tensor.ndim or tensor.device.type == "meta"}
        if name in ("_to_copy", "copy_"):
            return self._copy(name, operation, arguments, keywords)
        if here == {"cpu", "meta"}:
            raise AssertionError(f"{place()}: {name} mixes tensors of the CPU with those of the device")
        if "meta" not in here:
            return operation(*arguments, **keywords)
        if name in _PRODUCTS and not self.double and any(t.dtype == torch.float64 for t in tensors):
            raise AssertionError(f"{place()}: {name} in float64, for which GPUs are slow")
        if name == "_local_scalar_dense":
            return _number(self._wait(name), arguments[0].dtype)
        if name in ("nonzero", "masked_select"):
            rows = self._wait(name)
            shape = (rows, arguments[0].ndim) if name == "nonzero" else (rows,)
            return torch.empty(shape, dtype=torch.int64 if name == "nonzero" else arguments[0].dtype, device=META)
        if name in ("_unique2", "unique_consecutive", "unique_dim"):
            return self._unique(name, arguments[0])
        if name == "repeat_interleave" and len(tensors) == 1:  # of a tensor of lengths
            return torch.empty(keywords.get("output_size") or self._wait(name), dtype=torch.int64, device=META)
        if name == "bincount":
            return torch.empty(self._wait(name), dtype=torch.int64, device=META)
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in arguments[1]):
            return self._masked(*arguments)
        if name == "searchsorted":  # its meta kernel would read memory that is not there
            return torch.empty(arguments[1].shape, dtype=torch.int64, device=META)
        return operation(*arguments, **keywords)

    def _copy(self, name: str, operation: Any, arguments: Any, keywords: Any) -> Any:
        """Move values between the devices: from the device always a wait, to it unless it does not block."""
        if name == "copy_":
            target, source = arguments[0].device, arguments[1]
            blocking = not (arguments[2] if len(arguments) > 2 else keywords.get("non_blocking", False))
        else:
            source = arguments[0]
            target, blocking = keywords.get("device") or source.device, not keywords.get("non_blocking", False)
        if source.device == target:
            return operation(*arguments, **keywords)
        if target.type == "meta":
            if blocking and source.ndim:
                self._wait("copy to the device")
            return operation(*arguments, **keywords)
        answer = self._wait("copy to the host")
        if name == "copy_":
            return arguments[0].fill_(answer)
        return torch.full(source.shape, answer, dtype=keywords.get("dtype") or source.dtype)

    def _unique(self, name: str, values: Tensor) -> tuple[Tensor, ...]:
        rows = self._wait(name)
        counts = torch.empty(rows, dtype=torch.int64, device=META)
        return values.new_empty(rows), torch.empty(values.shape, dtype=torch.int64, device=META), counts

    def _masked(self, values: Tensor, masks: tuple[Tensor]) -> Tensor:
        """Index by a mask, which needs the number of its true elements."""
        return values.new_empty((self._wait("index"), *values.shape[masks[0].ndim :]))

    def _wait(self, operation: str) -> int:
        where = place()
        if where not in self.allowed:
            raise Waits(f"{where} waits for the device ({operation})")
        before, answer = self.seen.get(where, 0), self.allowed[where].answer
        self.seen[where] = before + 1
        return answer if isinstance(answer, int) else answer[before % len(answer)]


def _number(answer: int, dtype: torch.dtype) -> Any:
    return bool(answer) if dtype == torch.bool else float(answer) if dtype.is_floating_point else answer


def place() -> str:
    """Return module and function of the innermost frame in the package, such as ``mixture.em.posteriors``."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE):
            module = ".".join(path.relative_to(_PACKAGE).with_suffix("").parts)
            return f"{module}.{frame.f_code.co_qualname.removesuffix('.<locals>.<genexpr>')}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside the package"


@contextlib.contextmanager
def device_without_memory(monkeypatch: Any) -> Iterator[torch.device]:
    """Let the meta device pass for a GPU where PyTorch or the code asks for the kind of a device."""
    from torch.optim import adam, adamw, optimizer

    supported = optimizer._get_fused_kernels_supported_devices

    class Autocast(torch.autocast):
        def __init__(self, device_type: str, *arguments: Any, **keywords: Any) -> None:
            super().__init__("cpu" if device_type == "meta" else device_type, *arguments, **keywords)

    monkeypatch.setattr(torch, "autocast", Autocast)
    for module in (optimizer, adam, adamw):
        if hasattr(module, "_get_fused_kernels_supported_devices"):
            monkeypatch.setattr(module, "_get_fused_kernels_supported_devices", lambda: [*supported(), "meta"])
    monkeypatch.setitem(groups._BATCH_LIMIT, "meta", groups._BATCH_LIMIT["cuda"])
    yield META


def on_meta(value: Any) -> Any:
    """Move every tensor in an object of the package, a list, a tuple or a dictionary to the meta device."""
    if isinstance(value, Tensor):
        return value.to(META)
    if isinstance(value, dict):
        return {name: on_meta(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_meta(each) for each in value)
    if type(value).__module__.startswith("mmfm"):
        for name, each in vars(value).items():
            object.__setattr__(value, name, on_meta(each))
    return value


def network(task: FlowMatching, sizes: config.Model) -> DiT:
    """Return the model of a loss; its weights have no values to initialise."""
    with mock.patch.object(DiT, "initialize_weights"), META:
        return setup.model(task, sizes, SHAPE)
