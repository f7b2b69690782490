"""What every rollout engine takes and gives.

    engine = new_engine(EngineSettings(), model, chat.stop_ids, tokenizer.pad_token_id, to_text=chat.decode_all)
    settings = SamplingSettings(temperature=0.7, max_new_tokens=48, samples=4)
    groups = engine.generate([[1, 4, 20, 7, 5], ...], settings, NoiseKey(seed=0, row="ppo", iteration=3))
    groups[0][2].ids        # third sample of the first prompt, its stop token last
    groups[0][2].logprobs   # of each id under the distribution it was drawn from

An engine answers in the order of its prompts, `settings.samples` answers each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import Field, model_validator

from pipeline.flow.config import Settings, not_identity
from pipeline.flow.errors import UserError
from pipeline.rollout.noise import NoiseKey

Progress = Callable[[int, int], None]  # sequences finished, sequences in all
ToText = Callable[[Sequence[Sequence[int]]], list[str]]  # ids of answers -> their texts, ChatFormat.decode_all


def require_room(key: str, longest: int, max_tokens: int) -> None:
    """UserError where answers of that length leave no room for a prompt."""
    if longest >= max_tokens:
        raise UserError(
            f"{key}: answers of up to {longest} tokens leave no room for a prompt within max_tokens {max_tokens}: "
            "lower it, or raise max_tokens"
        )


class SamplingSettings(Settings):
    """How answers are drawn. Options act in transformers' order: repetition penalty, stop tokens barred before
    min_new_tokens, temperature, top_k, top_p, min_p."""

    temperature: float = Field(
        1.0, ge=0.0, description="Logits are divided by it; 0 takes the likeliest token every time (greedy)."
    )

    top_k: int = Field(0, ge=0, description="Draw from the k likeliest tokens only; 0 draws from all.")

    top_p: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="Draw from the fewest tokens that together have this probability; 1 draws from all.",
    )

    min_p: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Draw from the tokens that have at least this share of the likeliest one's probability (Nguyen et "
        "al. 2024); 0 draws from all.",
    )

    repetition_penalty: float = Field(
        1.0,
        gt=0.0,
        description="Logits of tokens that stand in the prompt or the answer are divided by it where positive and "
        "multiplied where negative (Keskar et al. 2019, as in transformers); 1 penalises nothing.",
    )

    max_new_tokens: int = Field(
        48, ge=1, description="An answer that has not stopped by then is cut and counts as unfinished."
    )

    min_new_tokens: int = Field(
        0, ge=0, description="No stop token is drawn before an answer has this many other tokens."
    )

    stop_strings: tuple[str, ...] = Field(
        (), description="An answer ends, stopped, with the first token after which its text holds one of these."
    )

    samples: int = Field(1, ge=1, description="Answers for each prompt.")

    num_beams: int = Field(
        1,
        ge=1,
        description="Beam search with this many beams (with temperature 0): the answers are its `samples` best, best "
        "first; 1 is no beam search.",
    )

    length_penalty: float = Field(
        1.0,
        description="A finished beam's log-prob is divided by its length to this power, as in transformers: above 0 "
        "favours longer answers.",
    )

    early_stopping: bool | Literal["never"] = Field(
        False,
        description="Beam search ends for a prompt when num_beams are finished (true), when the best running beam at "
        'its present length cannot beat them (false), or when it cannot at any length ("never"), as in transformers.',
    )

    @model_validator(mode="after")
    def _agree(self) -> SamplingSettings:
        if self.min_new_tokens >= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} leaves no room for a stop token within max_new_tokens "
                f"{self.max_new_tokens}: lower min_new_tokens"
            )
        if "" in self.stop_strings:
            raise ValueError("stop_strings holds an empty string, which every text holds: leave it out")
        if self.stop_strings and self.min_new_tokens:
            raise ValueError("min_new_tokens bars stop tokens, text cannot be barred: leave it or stop_strings out")
        if self.num_beams > 1 and self.temperature != 0.0:
            raise ValueError(f"num_beams {self.num_beams} is a search, not a draw: set temperature 0")
        if 1 < self.num_beams < self.samples:
            raise ValueError(f"num_beams {self.num_beams} gives no {self.samples} samples: raise num_beams")
        return self

    @property
    def truncated(self) -> bool:
        """Whether the sampler's log-probs are others than softmax(logits / temperature): tokens are cut from it, barred
        or penalised, or none is drawn at all (greedy, beams)."""
        cut = self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0 or self.min_new_tokens > 0
        return cut or self.repetition_penalty != 1.0 or self.temperature == 0.0


class VllmSettings(Settings):
    """How vLLM runs (`trl.generation.vllm_generation.VLLMGeneration`, whose defaults these are)."""

    mode: Literal["colocate", "server"] = Field(
        "colocate", description="In this process, on the training devices, or a server started with `vllm serve`."
    )

    server_url: str = not_identity("http://localhost:8000", description="Where the server answers (mode server).")

    server_timeout: float = not_identity(240.0, gt=0.0, description="Seconds to wait for the server.")

    group_port: int = not_identity(51216, ge=1, le=65535, description="Port over which the server gets weights.")

    tensor_parallel_size: int = not_identity(1, ge=1, description="Devices that share one model (mode colocate).")

    gpu_memory_utilization: float = not_identity(
        0.3, gt=0.0, le=1.0, description="Share of a device's memory that vLLM reserves (mode colocate)."
    )

    sleep: bool = not_identity(
        False, description="Free vLLM's weights and cache between calls, which takes time each call (mode colocate)."
    )


class EngineSettings(Settings):
    """Which engine samples, and how it runs."""

    engine: Literal["native", "vllm"] = Field(
        "native",
        description="native decodes here, reproducibly; vllm needs the extra `vllm` and a GPU, and is not bit for bit "
        "reproducible.",
    )

    precision: Literal["model", "bfloat16"] = Field(
        "model",
        description="Precision of the native engine's linear layers; model keeps the weights' own. In another one the "
        "sampler's log-probs differ from the trainer's by rounding.",
    )

    rows: int = not_identity(256, ge=1, description="Most sequences that are decoded at once.")

    cache_gib: float = not_identity(
        1.0, gt=0.0, description="Memory for the native engine's keys and values, in GiB; fewer rows where it is short."
    )

    vllm: VllmSettings = Field(default=VllmSettings(), description="How vLLM runs.")

    @model_validator(mode="after")
    def _agree(self) -> EngineSettings:
        if self.engine == "vllm" and self.precision != "model":
            raise ValueError("precision is the native engine's; vLLM computes in the policy's own: leave it out")
        return self


@dataclass(frozen=True, slots=True)
class Generated:
    """One answer. The three sequences are aligned; a stop token is the last id and nothing follows it.

    logprobs        under the distribution the token was drawn from: penalties, barred tokens, temperature, top_k,
                    top_p, min_p; all 0 when greedy and in beam search
    raw_logprobs    under the model's own distribution, temperature 1
    stopped         ended by a stop token or a stop string, not cut at max_new_tokens. All ids are kept that were
                    drawn: the token that completes a stop string too, with whatever else it spells, so the text
                    still holds the string
    """

    prompt: int
    index: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    raw_logprobs: tuple[float, ...]
    stopped: bool


@dataclass(slots=True)
class Usage:
    """What an engine has computed, in tokens; never in seconds, which differ from run to run."""

    prompt_tokens: int = 0  # fed as prompts, each prompt once however many samples it has
    new_tokens: int = 0  # returned
    steps: int = 0  # of the decoding loop; 0 where the engine does not tell


class Engine(Protocol):
    usage: Usage

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        key: NoiseKey,
        progress: Progress | None = None,
        *,
        names: Sequence[int | str] | None = None,
    ) -> list[list[Generated]]:
        """Answers to each prompt, in order, from the model's weights as they are at this call.

        `names` are what the noise knows prompts by (record ids, say): then a prompt's samples are the same
        whatever stands beside it. Without names a prompt is known by its ids (and equal prompts by their
        order). Raises UserError for an option that the engine does not have.
        """

    def release(self) -> None:
        """Give memory back that is kept between calls."""


def new_engine(
    settings: EngineSettings,
    model: Any,
    stop_ids: Sequence[int],
    pad_id: int,
    *,
    to_text: ToText | None = None,
    tokenizer: Any = None,
    accelerator: Any = None,
) -> Engine:
    """The engine that `settings` names, for a causal model (or its PEFT wrapper), which stays the caller's.

    to_text     needed for `stop_strings`
    tokenizer   needed by vLLM, which is given a directory with the model
    accelerator vLLM's ranks; None takes the process's own

    Raises UserError where vLLM is asked for and absent.
    """
    if settings.engine == "vllm":
        from pipeline.rollout.vllm import VllmEngine

        return VllmEngine(model, stop_ids, tokenizer, settings, to_text=to_text, accelerator=accelerator)

    import torch

    from pipeline.rollout.native import NativeEngine

    return NativeEngine(
        model,
        stop_ids,
        pad_id,
        rows=settings.rows,
        cache_bytes=int(settings.cache_gib * (1 << 30)),
        linear_dtype=None if settings.precision == "model" else getattr(torch, settings.precision),
        to_text=to_text,
    )


def require_text(to_text: ToText | None, settings: SamplingSettings) -> None:
    if settings.stop_strings and to_text is None:
        raise UserError("sampling.stop_strings: this engine was made without to_text, which decodes answers")


def check_prompts(
    prompts: Sequence[Sequence[int]], settings: SamplingSettings, config: Any, virtual_tokens: int = 0
) -> int:
    """The columns that the longest prompt and its answer take behind virtual tokens; UserError where the model has not
    as many positions."""
    if not all(prompts):
        raise UserError("sampling: a prompt without tokens; a prompt needs at least its begin token")
    columns = virtual_tokens + max(map(len, prompts)) + settings.max_new_tokens
    limit = getattr(config, "max_position_embeddings", columns)
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "dynamic":  # says what it was trained at
        limit = columns
    if columns > limit:
        raise UserError(
            f"sampling: the longest prompt and {settings.max_new_tokens} new tokens need {columns} positions"
            f"{f' behind {virtual_tokens} virtual tokens' if virtual_tokens else ''}, the "
            f"model has {limit}: lower sampling.max_new_tokens or leave long prompts out"
        )
    return columns
