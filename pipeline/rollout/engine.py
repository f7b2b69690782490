"""What every rollout engine takes and gives.

    engine = NativeEngine(model, stop_ids=chat.stop_ids, pad_id=tokenizer.pad_token_id)
    settings = SamplingSettings(temperature=0.7, max_new_tokens=48, samples=4)
    groups = engine.generate([[1, 4, 20, 7, 5], ...], settings, NoiseKey(seed=0, row="ppo", iteration=3))
    groups[0][2].ids        # third sample of the first prompt, its stop token last
    groups[0][2].logprobs   # of each id under the distribution it was drawn from

An engine answers in the order of its prompts, `settings.samples` answers each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import Field, model_validator

from pipeline.flow.config import Settings
from pipeline.rollout.noise import NoiseKey

Progress = Callable[[int, int], None]  # sequences finished, sequences in all


class SamplingSettings(Settings):
    """How answers are drawn."""

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

    max_new_tokens: int = Field(
        48, ge=1, description="An answer that has not stopped by then is cut and counts as unfinished."
    )

    min_new_tokens: int = Field(
        0, ge=0, description="No stop token is drawn before an answer has this many other tokens."
    )

    samples: int = Field(1, ge=1, description="Answers for each prompt.")

    @model_validator(mode="after")
    def _agree(self) -> SamplingSettings:
        if self.min_new_tokens >= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} leaves no room for a stop token within max_new_tokens "
                f"{self.max_new_tokens}: lower min_new_tokens"
            )
        return self

    @property
    def truncated(self) -> bool:
        """Whether tokens are cut from the distribution, so that its log-probs are not the policy's own."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_new_tokens > 0 or self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Generated:
    """One answer. The three sequences are aligned; a stop token is the last id and nothing follows it.

    logprobs        under the distribution the token was drawn from: forbidden tokens removed, temperature,
    top_k,
                    top_p; all 0 when greedy
    raw_logprobs    under the model's own distribution, temperature 1
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
    steps: int = 0  # of the decoding loop


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
        """Answers to each prompt, in order.

        `names` are what the noise knows prompts by (record ids, say): then a prompt's samples are the same
        whatever stands beside it. Without names a prompt is known by its ids (and equal prompts by their
        order).
        """
