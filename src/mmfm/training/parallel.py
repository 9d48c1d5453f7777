"""Data parallelism: the whole model in every process (DDP), or sharded among them (FSDP2).

In both cases the optimiser and the average update plain tensors (whole parameters, or this process's shards), and
checkpoints hold whole tensors, so that a run can resume with another number of processes or the other method.

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
from mmfm.models.layers import blocks, compile_blocks


def replicated(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Return a module that shares the model's parameters and averages their gradients over the processes."""
    devices = [device] if device.type == "cuda" else None
    made = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    # Buffers are constants. The argument for this was renamed in PyTorch 2.13; the attribute works before and after.
    made.broadcast_buffers = False
    return made


class Whole:
    """Every process holds the whole model.

    Args:
        model: on its device, with the same weights in all processes.
        average: its moving average, or None.

    Attributes:
        tensors: the tensors that the optimiser updates, each with its gradient after :meth:`gradients`.
        averages: the corresponding tensors of the average.
    """

    def __init__(self, model: nn.Module, average: nn.Module | None, ranks: Ranks, compiled: bool = False) -> None:
        self.model, self.average, self.ranks = model, average, ranks
        self._modules = {"model": model} if average is None else {"model": model, "ema": average}
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.tensors: list[Tensor] = list(self._trained.values())
        self.averages: list[Tensor] = (
            [] if average is None else [dict(average.named_parameters())[n] for n in self._trained]
        )

    def wrapped(self, compiled: bool) -> nn.Module:
        """Return the module to call in the forward pass; it shares the model's parameters."""
        if compiled:
            compile_blocks(self.model)
        if self.ranks.world == 1:
            return self.model
        if compiled:
            # For models compiled as a whole: it would cut every block's graph at 25 MB of weights.
            torch._dynamo.config.optimize_ddp = False
        return replicated(self.model, self.ranks.device)

    def part(self, forward: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Return the context of a micro batch's passes; only the last one of a step exchanges gradients."""
        if isinstance(forward, DistributedDataParallel) and not last:
            return forward.no_sync()
        return contextlib.nullcontext()

    def gradients(self) -> list[Tensor]:
        """Return the gradients, averaged over the processes."""
        return [t.grad for t in self.tensors if t.grad is not None]

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the Euclidean norm of the whole gradient."""
        return nn.utils.get_total_norm(gradients)

    def forget_gradients(self) -> None:
        """Free the gradients; with DDP set them to zero, as they are views of its buckets, which stay anyway."""
        gradients = self.gradients()
        if self.ranks.world > 1 and gradients:
            torch._foreach_zero_(gradients)
            return
        for tensor in self.tensors:
            tensor.grad = None

    def state(self, part: str) -> dict[str, Tensor]:
        """Return the whole state dict of ``model`` or ``ema``; collective, valid on the main process."""
        return self._modules[part].state_dict()

    def load(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Load a state dict from :meth:`state`."""
        self._modules[part].load_state_dict(tensors)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the whole state dict of an optimiser of :attr:`tensors`; collective, valid on the main process."""
        return optimizer.state_dict()

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Load a state dict from :meth:`optimizer_state`."""
        optimizer.load_state_dict(state)

    def whole_average(self, everywhere: bool = False) -> nn.Module:
        """Return the average, or without one the model, as a plain module; collective, valid on the main process.

        Args:
            everywhere: make the result valid on every process; each then holds the whole model.
        """
        return self.model if self.average is None else self.average


class Sharded(Whole):
    """Shards parameters, gradients, average and optimiser state; a block is gathered while it computes.

    The FSDP units are the elements of module lists (a transformer's blocks), plus one for the rest of the model.
    """

    def __init__(self, model: nn.Module, average: nn.Module | None, ranks: Ranks, compiled: bool) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        # FSDP warns because the model's output is a view; nothing modifies it in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        self._plain = copy.deepcopy(model).to("meta")
        mesh = init_device_mesh(ranks.device.type, (ranks.world,))

        def shard(module: nn.Module, compiled: bool) -> FSDPModule:
            if compiled:
                compile_blocks(module)
            for block in blocks(module):
                fully_shard(block, mesh=mesh)
            return fully_shard(module, mesh=mesh)

        self._root = shard(model, compiled)
        if average is not None:
            shard(average, False)
        super().__init__(model, average, ranks)
        # FSDP swaps in whole parameters while it computes, so keep references to the shards.
        self._shards: dict[str, dict[str, Any]] = {  # of DTensors
            part: dict(module.named_parameters()) for part, module in self._modules.items()
        }
        self._parameters = [self._shards["model"][name] for name in self._trained]
        self.tensors = [p.to_local().detach().requires_grad_() for p in self._parameters]
        self.averages = [p.to_local().detach() for n, p in self._shards.get("ema", {}).items() if n in self._trained]

    def wrapped(self, compiled: bool) -> nn.Module:
        """Return the model itself; its blocks were compiled before they were sharded."""
        return self.model

    def part(self, forward: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """See :class:`Whole`."""
        self._root.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def forget_gradients(self) -> None:
        """See :class:`Whole`."""
        for parameter in self._trained.values():
            parameter.grad = None
        for shard in self.tensors:
            shard.grad = None

    def gradients(self) -> list[Tensor]:
        """Return this process's shards of the gradients, averaged over the processes."""
        for shard, parameter in zip(self.tensors, self._parameters, strict=True):
            shard.grad = None if parameter.grad is None else parameter.grad.to_local()
        return super().gradients()

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """See :class:`Whole`."""
        return self.ranks.sum(super().norm(gradients).square()).sqrt()

    def state(self, part: str) -> dict[str, Tensor]:
        """See :class:`Whole`."""
        buffers = dict(self._modules[part].named_buffers())
        return {**{name: self._kept(p.full_tensor()) for name, p in self._shards[part].items()}, **buffers}

    def load(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """See :class:`Whole`."""
        buffers = dict(self._modules[part].named_buffers())
        if tensors.keys() != self._shards[part].keys() | buffers.keys():
            raise ValueError(
                f"the checkpoint's {part} has other tensors than the model; remove the state directory to start over"
            )
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
        whole: dict[int, dict[str, Any]] = {}
        for index, parameter in enumerate(self._parameters):
            whole[index] = {}
            for name, value in state["state"].get(index, {}).items():
                if value.ndim:  # the step count is not sharded
                    value = DTensor.from_local(
                        value,
                        parameter.device_mesh,
                        parameter.placements,
                        run_check=False,
                        shape=parameter.shape,
                        stride=parameter.stride(),
                    ).full_tensor()
                whole[index][name] = self._kept(value)
        return {**state, "state": whole}

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """See :class:`Whole`."""
        shards = {
            index: {name: _shard_of(v, self._parameters[index]) if v.ndim else v for name, v in values.items()}
            for index, values in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": shards})

    @torch.no_grad()
    def whole_average(self, everywhere: bool = False) -> nn.Module:
        """See :class:`Whole`. Every process gathers every tensor; ``everywhere`` decides whether it keeps them."""
        part, whole, own = "model" if self.average is None else "ema", self._plain, {}
        if self.ranks.is_main or everywhere:
            whole = copy.deepcopy(self._plain).to_empty(device=self.ranks.device).eval().requires_grad_(False)
            own = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
        for name, shard in self._shards[part].items():
            tensor = shard.full_tensor()
            if own:
                own[name].copy_(tensor)
        for name, buffer in self._modules[part].named_buffers():
            if own:
                own[name].copy_(buffer)
        return whole

    def _kept(self, tensor: Tensor) -> Tensor:
        """Move a gathered tensor to the CPU of the main process; the others drop it."""
        return tensor.cpu() if self.ranks.is_main else tensor.new_empty(0)


def _shard_of(tensor: Tensor, like: Any) -> Tensor:
    """Return this process's shard of a whole tensor, sharded like the DTensor ``like``, without communication."""
    from torch.distributed.tensor import distribute_tensor

    mesh = like.device_mesh
    return distribute_tensor(tensor.to(like.device), mesh, like.placements, src_data_rank=None).to_local()


def divide(sharding: str, model: nn.Module, average: nn.Module | None, ranks: Ranks, compiled: bool) -> Whole:
    """Divide a model and its average by a method in :data:`mmfm.config.choices.SHARDINGS`; one process keeps both."""
    kind = SHARDINGS[sharding].load()
    return kind(model, average, ranks, compiled) if ranks.world > 1 else Whole(model, average, ranks)
