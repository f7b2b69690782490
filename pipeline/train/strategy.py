"""Devices and ranks: one process, DDP, DeepSpeed (zero.py) or FSDP2 (fsdp.py) behind what the loop needs.

A `Strategy` knows ranks and exchanges numbers; an `Engine` holds one module and its optimiser. Accelerate
places, wraps and shards; where a step begins and ends is decided by the loop alone (accelerate and DeepSpeed
see gradient_accumulation_steps=1), and so is precision: bf16 is autocast over float32 master weights, except
under DeepSpeed, which keeps its own float32 masters of bf16 weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeline.flow.errors import Damaged, UserError
from pipeline.llama.device import chosen_device
from pipeline.llama.precision import bfloat16_is_fast, chosen_precision
from pipeline.train.optim import put_state, state_shapes

if TYPE_CHECKING:
    from accelerate import Accelerator

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of one parameter


class Strategy:
    """The ranks of this run and what they tell each other. `build` makes one."""

    def __init__(self, accelerator: Accelerator, fsdp: bool = False) -> None:
        self.accelerator, self.fsdp = accelerator, fsdp

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def deepspeed(self) -> Any:
        """DeepSpeed's plugin, or None."""
        return getattr(self.accelerator.state, "deepspeed_plugin", None)

    @property
    def sharded(self) -> bool:
        """Whether weights are cut up over ranks."""
        return self.fsdp or (self.deepspeed is not None and self.deepspeed.zero_stage == 3)

    @property
    def places(self) -> bool:
        """Whether the engine brings a module to the device: ZeRO-3, which casts it before and cuts it up there."""
        return self.sharded and not self.fsdp

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, by rank; floats arrive exactly. Every rank must call it."""
        if self.world == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        torch.distributed.all_gather(sizes, torch.tensor([data.numel()], device=self.device))
        longest = max(int(s) for s in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: data.numel()] = data
        everyone = [torch.empty_like(padded) for _ in range(self.world)]
        torch.distributed.all_gather(everyone, padded)
        texts = [bytes(e[: int(n)].cpu().numpy()) for e, n in zip(everyone, sizes, strict=True)]
        return [json.loads(text) for text in texts]

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Which of the items of these sizes (tokens) are this rank's: every item is exactly one rank's.

        Largest first, dealt there and back again, so that ranks get nearly equal loads; a pure function, so
        that all ranks agree without a word.
        """
        order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
        there_and_back = [*range(self.world), *reversed(range(self.world))]
        return [i for turn, i in enumerate(order) if there_and_back[turn % len(there_and_back)] == self.rank]

    def engine(self, module: nn.Module, optimizer: torch.optim.Optimizer, precision: str) -> Engine:
        if self.sharded and any(hasattr(m, "quantisation") for m in module.modules()):
            raise UserError(
                "adapter.quantise: weights of few bits are not cut up over ranks: use launch.strategy ddp, or "
                "deepspeed with zero_stage 1 or 2"
            )
        if (self.fsdp or self.deepspeed is not None) and not isinstance(optimizer, torch.optim.AdamW):
            raise UserError(
                "train.optimizer: under fsdp and deepspeed moments are cut over the ranks as adamw has them: use adamw "
                "there, or launch.strategy ddp"
            )
        if self.fsdp:
            from pipeline.train.fsdp import FsdpEngine

            return FsdpEngine(self, module, optimizer, precision)
        if self.deepspeed is None:
            return Engine(self, module, optimizer, precision)
        from pipeline.train.zero import DeepSpeedEngine

        return DeepSpeedEngine(self, module, optimizer, precision)


class Engine:
    """One module and its optimiser in one process or under DDP."""

    @property
    def layout(self) -> str:
        """`whole`: `state` gives the same on every rank. Otherwise each rank has a part of its own, and what was saved
        under another layout cannot be loaded."""
        return "whole"

    def __init__(self, strategy: Strategy, module: nn.Module, optimizer: torch.optim.Optimizer, precision: str) -> None:
        self.strategy = strategy
        self.bare = module
        self.precision = precision
        self.optimizer: Any = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.module: Any = None
        self._prepare()

    def _prepare(self) -> None:
        self.module = self.strategy.accelerator.prepare_model(self.bare)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of the prepared module under the run's precision."""
        with self.autocast():
            return self.module(*args, **kwargs)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "bf16":
            return torch.autocast(self.strategy.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Wraps forward and backward of one micro-batch: ranks average gradients in the last one only."""
        return nullcontext() if last else self.strategy.accelerator.no_sync(self.module)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def gradient_norm(self, clip: float) -> float | None:
        """Norm of the whole gradient before clipping to `clip` (0: none); None where it is known after the
        update.
        """
        limit = clip if clip > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        return float(norm)

    def part_norm(self, prefix: str) -> float | None:
        """Norm of the gradient of the parameters whose name starts so, before clipping; None where it is not known."""
        grads = [p.grad for name, p in self.bare.named_parameters() if name.startswith(prefix) and p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0

    def hold(self, prefixes: Collection[str]) -> None:
        """Leave parameters whose name starts so out of the next update: neither they nor their moments move."""
        for name, parameter in self.bare.named_parameters():
            if name.startswith(tuple(prefixes)):
                parameter.grad = None

    def update(self) -> float | None:
        """One optimiser step; the gradient norm where `gradient_norm` could not give it."""
        self.optimizer.step()
        return None

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, the bare module holds all its weights on every rank, and may be called without the engine: to sample
        from it, or to save it. Gathered once, where they are cut up. Every rank must enter it; without gradients.
        """
        yield

    def held(self) -> list[torch.Tensor]:
        """What this rank holds of each trained parameter: its shard, where they are cut up."""
        return list(self.parameters)

    @torch.no_grad()
    def take(self, tensors: Sequence[torch.Tensor]) -> None:
        """Put back what `held` gave. For what is left of a row: an update would go on from the later weights."""
        for own, kept in zip(self.held(), tensors, strict=True):
            own.copy_(kept)

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.bare.named_parameters() if p.requires_grad]

    def state(self) -> dict[str, torch.Tensor]:
        """What an update reads and writes, the live tensors: weights in float32, moments and their step."""
        found: dict[str, torch.Tensor] = {}
        for name, parameter in self.trained():
            found[f"model.{name}"] = parameter
            kept = state_shapes(self.optimizer, parameter.shape)
            held = self.optimizer.state.get(parameter, {})
            found |= {f"{key}.{name}": torch.as_tensor(value) for key, value in held.items() if key in kept}
        return found

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse, on every rank. Damaged where something is missing or has another shape."""
        for name, parameter in self.trained():
            kept = state_shapes(self.optimizer, parameter.shape)
            stored = stored_state(name, parameter.shape, tensors, kept)
            parameter.copy_(stored.pop("model"))
            if stored:  # one that no update has reached yet has none
                put_state(self.optimizer, parameter, stored)


def stored_state(
    name: str, shape: torch.Size, tensors: Mapping[str, torch.Tensor], kept: Mapping[str, Sequence[int]] | None = None
) -> dict[str, torch.Tensor]:
    """What `Engine.state` gave of one parameter: its `model`, and none or all of what is kept, by shape (AdamW's
    moments otherwise). Damaged where it does not."""
    kept = kept or {"exp_avg": shape, "exp_avg_sq": shape, "step": ()}
    found = {key: tensors[f"{key}.{name}"] for key in ("model", *kept) if f"{key}.{name}" in tensors}
    wrong = [k for k, v in found.items() if k != "step" and tuple(v.shape) != tuple(kept.get(k, shape))]
    if "model" not in found or len(found) not in (1, 1 + len(kept)) or wrong:
        raise Damaged(f"the checkpoint does not hold {name} of shape {tuple(shape)} whole, but {sorted(found)}")
    return found


def build(
    *,
    processes: int = 1,
    strategy: str = "single",
    device: str = "auto",
    zero_stage: int = 2,
    offload: str = "none",
    precision: str = "fp32",
    clip: float = 1.0,
    deepspeed: Mapping[str, Any] | None = None,
) -> Strategy:
    """A strategy from launch settings; the environment's ranks (RANK, WORLD_SIZE …) must be as many as asked
    for.

    `deepspeed` is a DeepSpeed configuration merged over the one that `zero_stage` and `offload` describe.
    UserError where the world is not as large as asked for, or the strategy is unknown.
    """
    from accelerate import Accelerator

    if strategy not in ("single", "ddp", "deepspeed", "fsdp"):
        raise UserError(f"launch.strategy: {strategy!r} does not train here; use single, ddp, deepspeed or fsdp")
    found = int(os.environ.get("WORLD_SIZE", "1"))
    if found != processes:
        raise UserError(f"launch.processes: {processes} asked for, but this process is one of {found}")
    on_cpu = chosen_device(device).type == "cpu"
    keywords: dict[str, Any] = {"gradient_accumulation_steps": 1, "mixed_precision": "no"}
    if strategy == "deepspeed":
        from pipeline.train import zero

        keywords |= zero.keywords(zero.configuration(zero_stage, offload, precision, clip, deepspeed), on_cpu)
    else:
        keywords |= _ddp_keywords() | {"cpu": on_cpu}
    made = Strategy(Accelerator(**keywords), fsdp=strategy == "fsdp" and found > 1)
    if strategy == "deepspeed":
        zero.load_whole()
    if made.world != processes:  # accelerate may take several processes for one without a word
        raise UserError(f"launch.processes: {processes} asked for, but accelerate found {made.world}")
    return made


def for_row(workspace: Any, *, precision: str = "fp32", clip: float = 1.0) -> Strategy:
    """`build` from a row's workspace: its launch settings, and the ranks its worker was started with."""
    known = ("strategy", "device", "zero_stage", "offload", "deepspeed")
    chosen = {key: workspace.launch[key] for key in known if key in workspace.launch}
    device = chosen_device(chosen.get("device", "auto")).type
    computed = chosen_precision(precision, device)
    made = build(processes=workspace.world, **chosen, precision=computed, clip=clip)
    if len(set(made.gather(computed))) > 1:
        raise UserError("train.precision: auto is bf16 on some ranks and fp32 on others: choose one of them")
    if precision == "auto":
        workspace.say(f"train.precision: auto, which is {computed} on this {device}")
    elif computed == "bf16" and not bfloat16_is_fast(device):
        workspace.say(f"train.precision: bf16 is many times slower than fp32 on this {device}; auto would choose fp32")
    return made


def _ddp_keywords() -> dict[str, Any]:
    from accelerate.utils import DistributedDataParallelKwargs

    return {"kwargs_handlers": [DistributedDataParallelKwargs(broadcast_buffers=False)]}
