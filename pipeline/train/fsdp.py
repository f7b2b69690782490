"""FSDP2: weights, gradients and optimiser state cut up over ranks by PyTorch's own `fully_shard`.

Not through accelerate: its FSDP on a CPU reports a world of one and leaves gradients unsynchronised, without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from pipeline.train.strategy import MOMENTS, Engine, stored_state


class FsdpEngine(Engine):
    """One group of parameters a decoder layer, and one for the rest of the module."""

    layout = "fsdp"

    def _prepare(self) -> None:
        names = {id(p): name for name, p in self.bare.named_parameters()}
        mesh = init_device_mesh(self.strategy.device.type, (self.strategy.world,))
        for layer in _layers(self.bare):
            fully_shard(layer, mesh=mesh)
        self.module = fully_shard(self.bare, mesh=mesh)
        sharded = dict(self.bare.named_parameters())
        for group in self.optimizer.param_groups:  # made over the parameters that there were before
            group["params"] = [sharded[names[id(p)]] for p in group["params"]]
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._trained = [(name, p) for name, p in sharded.items() if p.requires_grad]

    def _cut(self) -> None:
        """The shards are the weights again: an evaluation leaves whole ones, which no update of a shard would reach."""
        for module in self._sharded():
            module.reshard()

    def _sharded(self) -> list[FSDPModule]:
        return [m for m in self.bare.modules() if isinstance(m, FSDPModule)]

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        self._cut()
        return self._trained

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        self.module.set_requires_gradient_sync(last)
        return nullcontext()

    def gradient_norm(self, clip: float) -> float | None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        torch.nn.utils.clip_grads_with_norm_(self.parameters, clip if clip > 0 else float("inf"), whole)
        return float(whole)

    def part_norm(self, prefix: str) -> float | None:
        grads = [p.grad for name, p in self._trained if name.startswith(prefix) and p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def held(self) -> list[torch.Tensor]:
        self._cut()
        return [_local(p) for p in self.parameters]

    @contextmanager
    def whole(self) -> Iterator[None]:
        sharded = self._sharded()
        hooks = [m._state_dict_pre_hooks for m in self.bare.modules()]  # they cut the weights up before they are read
        calls: list[Any] = [*sharded]
        hooks += [part for m in calls for part in (m._forward_pre_hooks, m._forward_hooks)]  # or after every token
        before = [dict(part) for part in hooks]
        for module in sharded:
            module.unshard()
        for part in hooks:
            part.clear()
        try:
            yield
        finally:
            for part, own in zip(hooks, before, strict=True):
                part.update(own)
            for module in sharded:
                module.reshard()

    def state(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, parameter in self.trained():
            found[f"model.{name}"] = _local(parameter)
            held = self.optimizer.state.get(parameter, {})
            found |= {f"{key}.{name}": _local(torch.as_tensor(v)) for key, v in held.items() if key in MOMENTS}
        return found

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.trained():
            stored = stored_state(name, _local(parameter).shape, tensors)
            _local(parameter).copy_(stored.pop("model"))
            if stored:
                moments: dict[str, Any] = {key: torch.zeros_like(parameter) for key in MOMENTS if key != "step"}
                for key, moment in moments.items():
                    _local(moment).copy_(stored[key])
                self.optimizer.state[parameter] = moments | {"step": stored["step"].clone().to(parameter.device)}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part, on the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _layers(module: nn.Module) -> list[nn.Module]:
    """The decoder layers of every model in it: the members of `layers`, as transformers calls them."""
    lists = [getattr(m, "layers", None) for m in module.modules()]
    return [layer for found in lists if isinstance(found, nn.ModuleList) for layer in found]
