"""The vLLM engine: the same answers contract as the native one, on vLLM through `trl.generation`.

    engine = new_engine(EngineSettings(engine="vllm"), policy, chat.stop_ids, pad_id, tokenizer=tokenizer)

Weights are sent to vLLM at every call; merging adapters for that leaves rounding errors in the base, so the base's
weights are put back bit for bit. It is given the policy alone, never a container with a value model.

What differs from the native engine: sampling is not keyed by `NoiseKey` and not bit for bit reproducible; a float32
policy is computed in half precision (vLLM's `dtype: auto`), so log-probs differ from the trainer's; there is no beam
search. A server must be started with `--logprobs-mode processed_logprobs`, without which its log-probs are not those
of the sampling distribution.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.flow.errors import NonFinite, UserError
from pipeline.llama import decode, quantise_settings, virtual
from pipeline.llama.heads import PolicyModel
from pipeline.llama.options import MODEL_TYPE
from pipeline.rollout.engine import (
    EngineSettings,
    Generated,
    Progress,
    SamplingSettings,
    ToText,
    Usage,
    check_prompts,
    require_text,
)
from pipeline.rollout.noise import NoiseKey
from pipeline.rollout.scoring import token_logprobs


def require_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "engine vllm: vLLM is not installed; pip install 'rlhf-pipeline[vllm]' (on a machine with a GPU), or set "
            "engine: native"
        )


def _require_known(model: nn.Module) -> None:
    if decode.base_model(model).config.model_type == MODEL_TYPE:
        raise UserError("engine vllm: it knows no model with options beyond plain LLaMA; set engine: native")


class VllmEngine:
    """Samples from `model` by vLLM, which starts at the first call, while the model's weights are gathered.

    Every rank of a distributed run must call `generate`, also with no prompts of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        stop_ids: Sequence[int],
        tokenizer: Any,
        settings: EngineSettings,
        *,
        to_text: ToText | None = None,
        accelerator: Any = None,
    ) -> None:
        require_vllm()
        _require_known(model)
        if virtual.count(model):
            raise UserError("engine vllm: a policy with virtual tokens is sampled by engine: native alone")
        if quantise_settings.of(model) is not None:
            raise UserError("engine vllm: a policy over weights of few bits is sampled by engine: native alone")
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.stop_ids, self.to_text = tuple(stop_ids), to_text
        self.usage = Usage()
        self._accelerator = accelerator
        self._generation: Any = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        key: NoiseKey,
        progress: Progress | None = None,
        *,
        names: Sequence[int | str] | None = None,
    ) -> list[list[Generated]]:
        """See `Engine.generate`. `key` and `names` are not used: vLLM draws its own noise."""
        if settings.num_beams > 1:
            raise UserError(f"sampling.num_beams {settings.num_beams}: not with vLLM; set engine: native")
        require_text(self.to_text, settings)
        if prompts:
            check_prompts(prompts, settings, decode.base_model(self.model).config)
        generation = self._started()
        with torch.no_grad(), base_weights_kept(self.model):
            generation.sync_weights()
        configure(generation, settings, self.stop_ids)
        k = settings.samples
        filled = [list(ids) for ids in prompts] + self._filling(len(prompts))
        if not filled:
            return []
        _, ids, logprobs, _ = generation.generate([p for p in filled for _ in range(k)], None, k)
        answers = [
            [self._answer(p, i, ids[p * k + i], logprobs[p * k + i], settings) for i in range(k)]
            for p in range(len(prompts))
        ]
        self.usage.prompt_tokens += sum(map(len, prompts))
        self.usage.new_tokens += sum(len(g.ids) for group in answers for g in group)
        if progress is not None:
            progress(len(prompts) * k, len(prompts) * k)
        return self._with_raw(prompts, answers, settings)

    def release(self) -> None:
        """Drop vLLM; the next call starts it again, which takes a while (`vllm.sleep` gives memory back cheaply)."""
        self._generation = None

    def _started(self) -> Any:
        if self._generation is None:
            import accelerate

            self._accelerator = self._accelerator or accelerate.Accelerator()
            self._generation = start(self.model, self.tokenizer, self.settings, self._accelerator)
        return self._generation

    def _filling(self, own: int) -> list[list[int]]:
        """Prompts that make every rank bring as many: trl cuts the gathered answers into equal shares."""
        if self._accelerator.num_processes == 1:
            return []
        from accelerate.utils import gather_object

        return [[self.stop_ids[0] if self.stop_ids else 0]] * (max(gather_object([own])) - own)

    def _answer(
        self, prompt: int, index: int, ids: Sequence[int], logprobs: Sequence[Sequence[Any]], s: SamplingSettings
    ) -> Generated:
        own = tuple(line[0] for line in logprobs)
        if any(x is None for x in own):
            raise NonFinite(f"vLLM gave a log-prob that is not a number, prompt {prompt}, sample {index}")
        stopped = len(ids) < s.max_new_tokens or (len(ids) > 0 and ids[-1] in self.stop_ids)
        if s.stop_strings and not stopped and self.to_text is not None:
            text = self.to_text([ids])[0]
            stopped = any(stop in text for stop in s.stop_strings)
        drawn = own if s.temperature else (0.0,) * len(own)
        return Generated(prompt, index, tuple(ids), drawn, own, stopped)

    def _with_raw(
        self, prompts: Sequence[Sequence[int]], groups: list[list[Generated]], s: SamplingSettings
    ) -> list[list[Generated]]:
        """vLLM tells one distribution. Where that is not the raw one, the raw log-probs are the model's own forward."""
        if s.temperature == 1.0 and not s.truncated:
            return groups
        if any(p.numel() == 0 for p in self.model.parameters()):
            raise UserError("vLLM tells no raw log-probs at other settings than temperature 1 of sharded weights")
        pairs = [(ids, [g.ids for g in group]) for ids, group in zip(prompts, groups, strict=True)]
        with decode.sampling_mode(self.model):
            raw = token_logprobs(PolicyModel(self.model), pairs)
        return [
            [replace(g, raw_logprobs=tuple(x.tolist())) for g, x in zip(group, own, strict=True)]
            for group, own in zip(groups, raw, strict=True)
        ]


def configure(generation: Any, s: SamplingSettings, stop_ids: Sequence[int]) -> None:
    """`s` as the attributes that `VLLMGeneration.generate` reads. Only our stop ids end an answer."""
    generation.temperature, generation.top_k, generation.top_p = s.temperature, s.top_k, s.top_p
    generation.min_p, generation.repetition_penalty = s.min_p, s.repetition_penalty
    generation.max_completion_length, generation.logprobs = s.max_new_tokens, 0
    generation.generation_kwargs = {
        "min_tokens": s.min_new_tokens,
        "stop_token_ids": list(stop_ids),
        "ignore_eos": True,  # the model's generation config does not decide
    }
    if s.stop_strings:
        generation.generation_kwargs |= {"stop": list(s.stop_strings), "include_stop_str_in_output": True}


def start(model: Any, tokenizer: Any, settings: EngineSettings, accelerator: Any) -> Any:
    """trl's VLLMGeneration for this model, from a directory that vLLM can open."""
    from trl.generation.vllm_generation import VLLMGeneration

    v = settings.vllm
    with _openable(model, tokenizer, needed=v.mode == "colocate"):
        return VLLMGeneration(
            model,
            accelerator,
            tokenizer,
            mode=v.mode,
            server_base_url=v.server_url,
            server_timeout=v.server_timeout,
            group_port=v.group_port,
            tensor_parallel_size=v.tensor_parallel_size,
            gpu_memory_utilization=v.gpu_memory_utilization,
            max_num_seqs=settings.rows,
            enable_sleep_mode=v.sleep,
        )


@contextmanager
def _openable(model: nn.Module, tokenizer: Any, needed: bool) -> Iterator[None]:
    """Inside, `model.name_or_path` is a directory with config, weights and tokenizer: its own, or a passing copy."""
    base = decode.base_model(model)
    if not needed or (Path(base.name_or_path) / "config.json").is_file():
        yield
        return
    from safetensors.torch import save_file

    before = base.name_or_path
    with tempfile.TemporaryDirectory(prefix="rlhf-vllm-") as directory:
        base.config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        save_file(_plain_weights(base), Path(directory) / "model.safetensors", metadata={"format": "pt"})
        try:
            base.name_or_path = directory
            yield
        finally:
            base.name_or_path = before


def _plain_weights(base: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters under the names that they have without adapters, adapters' own left out."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    added = {
        id(p)
        for layer in base.modules()
        if isinstance(layer, BaseTunerLayer)
        for name in layer.adapter_layer_names
        for p in getattr(layer, name).parameters()
    }
    named = ((n, p) for n, p in base.named_parameters() if id(p) not in added and ".modules_to_save." not in n)
    return {
        n.replace(".base_layer", "").replace(".original_module", ""): p.detach().cpu().contiguous() for n, p in named
    }


@contextmanager
def base_weights_kept(model: nn.Module) -> Iterator[None]:
    """Whatever merging and unmerging adapters did inside, the weights under them are afterwards what they were.

    W + BA - BA is W up to rounding, and rounding adds up over iterations. Also after an error. Weights sharded by
    ZeRO-3 need nothing: what is merged is the gathered copy, which is thrown away.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    bases: list[nn.Module] = [layer.get_base_layer() for layer in layers]
    kept = [
        (module, name, weight, weight.detach().clone())
        for module in bases
        for name, weight in module.named_parameters(recurse=False)
        if not hasattr(weight, "ds_id")
    ]
    try:
        yield
    finally:
        for layer in layers:
            layer.merged_adapters.clear()
        with torch.no_grad():
            for module, name, weight, copy in kept:
                weight.copy_(copy)
                module._parameters[name] = weight  # quantised layers replace theirs when adapters are merged
