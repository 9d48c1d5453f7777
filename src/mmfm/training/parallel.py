"""How a model is divided among processes: whole in each of them (DDP), or in shards (FSDP2).

Whichever it is, the optimiser and the average move plain tensors (whole parameters, or this process's shards of them),
and checkpoints hold whole tensors, so that a run may go on in another number of processes or the other way.

Sources: Li et al. 2020, "PyTorch Distributed"; Zhao et al. 2023, "PyTorch FSDP", in the per-parameter form of
``torch.distributed.fsdp.fully_shard``.
"""

import contextlib
import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmfm.config.choices import SHARDINGS
from mmfm.infra.distributed import Ranks


class Whole:
    """Every process holds the whole model.

    Args:
        model: what is trained, on its device and equal in all processes.
        average: its moving average, or None.

    Attributes:
        tensors: trained tensors that the optimiser moves, each with its gradient after :meth:`gradients`.
        averages: the same ones of the average.
    """

    def __init__(self, model: nn.Module, average: nn.Module | None, ranks: Ranks, compiled: bool = False) -> None:
        self.model, self.average, self.ranks = model, average, ranks
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.tensors: list[Tensor] = list(self._trained.values())
        self.averages: list[Tensor] = (
            [] if average is None else [dict(average.named_parameters())[n] for n in self._trained]
        )

    def wrapped(self, compiled: bool) -> nn.Module:
        """The model as the forward pass calls it; its parameters are the model's own."""
        if compiled:
            self.model.compile()
        if self.ranks.world == 1:
            return self.model
        devices = [self.ranks.device] if self.ranks.device.type == "cuda" else None
        return DistributedDataParallel(
            self.model, device_ids=devices, forward_sync_buffers=False, gradient_as_bucket_view=True
        )

    def part(self, forward: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Surrounds forward and backward pass of a micro batch; gradients are exchanged in a step's last one alone."""
        return forward.no_sync() if self.ranks.world > 1 and not last else contextlib.nullcontext()

    def gradients(self) -> list[Tensor]:
        """This process's gradients, averaged over the processes."""
        return [t.grad for t in self.tensors if t.grad is not None]

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Euclidean norm of the whole gradient."""
        return nn.utils.get_total_norm(gradients)

    def forget_gradients(self) -> None:
        """Free the gradients."""
        for tensor in self._trained.values():
            tensor.grad = None

    def state(self, part: str) -> dict[str, Tensor]:
        """Whole state dict of ``model`` or ``ema``; a collective call, of use on the main process."""
        return self._module(part).state_dict()

    def load(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` gave."""
        self._module(part).load_state_dict(tensors)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Whole state dict of an optimiser over :attr:`tensors`; a collective call, of use on the main process."""
        return optimizer.state_dict()

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Take up what :meth:`optimizer_state` gave."""
        optimizer.load_state_dict(state)

    def whole_average(self, everywhere: bool = False) -> nn.Module:
        """The average, or else the model, as a plain module; a collective call, of use on the main process.

        Args:
            everywhere: of use on every process, which then holds the whole of it.
        """
        return self.model if self.average is None else self.average

    def _module(self, part: str) -> nn.Module:
        return self.model if part == "model" else self.average


class Sharded(Whole):
    """Parameters, gradients, average and optimiser in shards; a block is gathered for as long as it computes.

    The elements of module lists (a transformer's blocks) are the units, what is left is one more.
    """

    def __init__(self, model: nn.Module, average: nn.Module | None, ranks: Ranks, compiled: bool) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # The model returns a view of its last product; nothing here changes it in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        self._plain = copy.deepcopy(model).to("meta")
        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        for module in (model, average):
            if module is None:
                continue
            blocks = [b for part in module.modules() if isinstance(part, nn.ModuleList) for b in part]
            for block in blocks:
                if compiled and module is model:
                    block.compile()
                fully_shard(block, mesh=mesh)
            fully_shard(module, mesh=mesh)
        super().__init__(model, average, ranks)
        # FSDP registers whole parameters while it computes: these references are to the shards, which stay.
        self._shards = {"model": dict(model.named_parameters())}
        if average is not None:
            self._shards["ema"] = dict(average.named_parameters())
        self.tensors = [p.to_local().detach().requires_grad_() for p in self._trained.values()]
        self.averages = [p.to_local().detach() for n, p in self._shards.get("ema", {}).items() if n in self._trained]

    def wrapped(self, compiled: bool) -> nn.Module:
        """The model itself: its blocks were compiled before they were divided."""
        return self.model

    def part(self, forward: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """See :class:`Whole`."""
        self.model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def forget_gradients(self) -> None:
        """See :class:`Whole`."""
        super().forget_gradients()
        for shard in self.tensors:
            shard.grad = None

    def gradients(self) -> list[Tensor]:
        """This process's shards of the gradients, averaged over the processes."""
        for shard, parameter in zip(self.tensors, self._trained.values(), strict=True):
            shard.grad = None if parameter.grad is None else parameter.grad.to_local()
        return super().gradients()

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Euclidean norm of the whole gradient."""
        return self.ranks.sum(super().norm(gradients).square()).sqrt()

    def state(self, part: str) -> dict[str, Tensor]:
        """See :class:`Whole`."""
        buffers = dict(self._module(part).named_buffers())
        return {**{name: self._kept(p.full_tensor()) for name, p in self._shards[part].items()}, **buffers}

    def load(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """See :class:`Whole`."""
        buffers = dict(self._module(part).named_buffers())
        if tensors.keys() != self._shards[part].keys() | buffers.keys():
            raise ValueError(f"a checkpoint's {part} has other tensors than the model: remove the state directory")
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name in buffers:
                    buffers[name].copy_(tensor)
                else:
                    shard = self._shards[part][name]
                    shard.to_local().copy_(_shard_of(tensor, shard))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """See :class:`Whole`."""
        from torch.distributed.tensor import DTensor

        state = optimizer.state_dict()
        whole = {}
        for index, parameter in enumerate(self._trained.values()):
            whole[index] = {}
            for name, value in state["state"].get(index, {}).items():
                if value.ndim:  # the count of steps is no shard
                    value = DTensor.from_local(
                        value, parameter.device_mesh, parameter.placements,
                        run_check=False, shape=parameter.shape, stride=parameter.stride(),
                    ).full_tensor()  # fmt: skip
                whole[index][name] = self._kept(value)
        return {**state, "state": whole}

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """See :class:`Whole`."""
        parameters = list(self._trained.values())
        shards = {
            index: {name: _shard_of(v, parameters[index]) if v.ndim else v for name, v in values.items()}
            for index, values in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": shards})

    @torch.no_grad()
    def whole_average(self, everywhere: bool = False) -> nn.Module:
        """See :class:`Whole`. Gathering gives every process every tensor anyway: it is a matter of keeping them."""
        part, whole, own = "model" if self.average is None else "ema", self._plain, {}
        if self.ranks.is_main or everywhere:
            whole = copy.deepcopy(self._plain).to_empty(device=self.ranks.device).eval().requires_grad_(False)
            own = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
        for name, shard in self._shards[part].items():
            tensor = shard.full_tensor()
            if own:
                own[name].copy_(tensor)
        for name, buffer in self._module(part).named_buffers():
            if own:
                own[name].copy_(buffer)
        return whole

    def _kept(self, tensor: Tensor) -> Tensor:
        """A gathered tensor, which only the main process keeps and not on the device."""
        return tensor.cpu() if self.ranks.is_main else tensor.new_empty(0)


def _shard_of(tensor: Tensor, like: Any) -> Tensor:
    """This process's shard of a whole tensor, divided as the distributed tensor ``like`` is; no communication."""
    from torch.distributed.tensor import distribute_tensor

    mesh = like.device_mesh
    return distribute_tensor(tensor.to(like.device), mesh, like.placements, src_data_rank=None).to_local()


def divide(sharding: str, model: nn.Module, average: nn.Module | None, ranks: Ranks, compiled: bool) -> Whole:
    """Divide a model and its average in one of :data:`mmfm.config.choices.SHARDINGS`; one process has the whole."""
    kind = SHARDINGS[sharding].load()
    return kind(model, average, ranks, compiled) if ranks.world > 1 else Whole(model, average, ranks)
