"""DeepSpeed: ZeRO stages 1 to 3, with and without offload, behind the operations of `Engine`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from pipeline.train.strategy import MOMENTS, Engine, stored_state

UNCLIPPED = 1e6  # DeepSpeed takes a clipping of 0 for "unset" and puts 1.0 in its place


class DeepSpeedEngine(Engine):
    """ZeRO 1-3. DeepSpeed clips inside its step, so a gradient's norm is known only after the update."""

    @property
    def layout(self) -> str:
        """What is flattened first, and how it is cut, follows from DeepSpeed's settings."""
        settings = json.dumps(
            self.strategy.deepspeed.deepspeed_config["zero_optimization"], sort_keys=True, default=str
        )
        stage, digest = self.module.zero_optimization_stage(), hashlib.sha256(settings.encode()).hexdigest()
        return f"deepspeed, zero_stage {stage}, settings {digest[:12]}"

    def _prepare(self) -> None:
        self._holding: frozenset[str] = frozenset()
        self.module, _ = self.strategy.accelerator.prepare(self.bare, self.optimizer)
        self.optimizer = self.module.optimizer
        load_whole()

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()  # precision is part of DeepSpeed's own configuration

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        self.module.set_gradient_accumulation_boundary(is_boundary=last)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        self.module.backward(loss)

    def gradient_norm(self, clip: float) -> float | None:
        return None

    def part_norm(self, prefix: str) -> float | None:
        return None

    def hold(self, prefixes: Collection[str]) -> None:
        """Their rate is 0, and `update` puts their moments and step back: DeepSpeed's own step needs every gradient."""
        self._holding = frozenset(prefixes)

    def update(self) -> float | None:
        held, self._holding = self._moments(self._holding), frozenset()
        self.module.step()
        for flat, before in held.items():
            self.optimizer.optimizer.state[flat] = before
        norm = self.module.get_global_grad_norm()
        return None if norm is None else float(norm)

    def _moments(self, prefixes: Collection[str]) -> dict[torch.Tensor, dict[str, Any]]:
        """Copies of what the optimiser keeps of the flat groups whose parameters' names start so."""
        inner = self.optimizer.optimizer
        group_of = getattr(self.optimizer, "sub_group_to_group_id", None)  # ZeRO-3 cuts its groups into smaller ones
        found: dict[torch.Tensor, dict[str, Any]] = {}
        for i, flat in enumerate(self._flat_groups() if prefixes else ()):
            if inner.param_groups[group_of[i] if group_of else i].get("prefix") in prefixes:
                kept = inner.state.get(flat, {})
                found[flat] = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kept.items()}
        return found

    def clear(self) -> None:
        """DeepSpeed clears gradients in its step."""

    @contextmanager
    def whole(self) -> Iterator[None]:
        """DeepSpeed's hooks would cut the weights up again after the first layer that is called, so they are off inside
        (as trl's unwrap_model_for_generation has it)."""
        if self.module.zero_optimization_stage() < 3:
            yield
            return
        import deepspeed

        offload = self.optimizer.parameter_offload
        with deepspeed.zero.GatheredParameters(list(self.bare.parameters())):
            parameters: list[Any] = list(self.bare.parameters())
            for parameter in parameters:
                parameter.ds_active_sub_modules.clear()
            for hook in (*offload.forward_hooks, *offload.backward_hooks):
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                offload._register_deepspeed_module(offload.module)

    def held(self) -> list[torch.Tensor]:
        return [getattr(p, "ds_tensor", p) for p in self.parameters]

    def state(self) -> dict[str, torch.Tensor]:
        """This rank's part of the float32 weights and of the optimiser's state, by flat group."""
        found: dict[str, torch.Tensor] = {}
        for i, flat in enumerate(self._flat_groups()):
            found[f"model.{i}"] = flat
            held = self.optimizer.optimizer.state.get(flat, {})
            found |= {f"{key}.{i}": torch.as_tensor(value) for key, value in held.items() if key in MOMENTS}
        return found

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for i, flat in enumerate(self._flat_groups()):
            stored = stored_state(str(i), flat.shape, tensors)
            flat.data.copy_(stored.pop("model"))
            if stored:
                self.optimizer.optimizer.state[flat] = {k: v.clone().to(flat.device) for k, v in stored.items()}
        self._spread()

    def _flat_groups(self) -> list[torch.Tensor]:
        """The float32 weights that this rank updates; DeepSpeed has no public name for them."""
        zero3 = self.module.zero_optimization_stage() == 3
        name = "fp32_partitioned_groups_flat" if zero3 else "single_partition_of_fp32_groups"
        return list(getattr(self.optimizer, name))

    def _spread(self) -> None:
        """The weights that a forward pass reads, from the float32 ones: what DeepSpeed does at the end of its step."""
        if self.module.zero_optimization_stage() < 3:
            self.optimizer.update_lp_params()
            return
        with self._small_ones_cut():
            for i in range(len(self._flat_groups())):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(i)

    @contextmanager
    def _small_ones_cut(self) -> Iterator[None]:
        """Small weights stay whole on every rank under ZeRO-3: inside they are cut, so that what changes the shards
        reaches them."""
        small = self.optimizer.persistent_parameters if self.module.zero_optimization_stage() == 3 else []
        if small:
            small[0].partition(small)
        yield
        if small:
            small[0].all_gather(small)

    @torch.no_grad()
    def take(self, tensors: Sequence[torch.Tensor]) -> None:
        with self._small_ones_cut():
            super().take(tensors)


def load_whole() -> None:
    """Models opened from now on, frozen ones that nothing updates, are whole on every rank: under ZeRO-3 transformers
    would cut them up while it loads them, outside of any engine that could gather them."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def configuration(
    zero_stage: int, offload: str, precision: str, clip: float, more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """DeepSpeed's configuration: the loop's own step boundary, our optimiser, no scheduler."""
    zero: dict[str, Any] = {"stage": zero_stage}
    if offload in ("optimizer", "all"):
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    if zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    base = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip if clip > 0 else UNCLIPPED,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offloaded updates by the optimiser that everything else uses
        # In other precisions DeepSpeed leaves the weights alone by itself where a gradient is not finite.
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": precision == "bf16"},
    }
    return _merged(base, more or {})


def _merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in more.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merged(out[key], value) if both else value
    return out


def keywords(settings: Mapping[str, Any], on_cpu: bool) -> dict[str, Any]:
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

    found: dict[str, Any] = {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=dict(settings))}
    if on_cpu:  # with cpu=True accelerate believes in a single process here
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        found["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo")]
    return found
