"""The records that travel through the chain, one JSON object a line.

    Document      {"text": "The river Orl runs through Dovan."}
    Conversation  {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    Comparison    {"prompt": [{"role": "user", "content": "Hi"}],
                   "completions": [{"text": "Hello.", "rank": 0}, {"text": "What.", "rank": 1}]}
    Rated         {"prompt": [{"role": "user", "content": "Hi"}], "completion": "Hello.", "desirable": true}
    Prompt        {"id": "p17", "messages": [{"role": "user", "content": "Hi"}]}
                  {"id": "p18", "messages": [{"role": "user", "content": "2 + 2?"}], "answer": "4"}
    Sample        {"prompt": {...}, "index": 0, "text": "Hello.", "ids": [...], "logprobs": [...], "stopped": true,
                   "scores": {"proxy": 1.2}, "origin": {"policy": "5f3c...", "row": "ppo", "iteration": 3, ...},
                   "cost": {"prompt": 12, "new": 3}}

Readers of foreign formats live in `sources.py`; they all end in these types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `content` is text, a list of typed parts, or None beside `tool_calls`."""

    role: str
    content: str | tuple[Mapping[str, Any], ...] | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    name: str | None = None
    weight: float | None = None  # 0 leaves an assistant turn out of the loss under train_on: marked


@dataclass(frozen=True, slots=True)
class Document:
    """Text for pretraining. A document may instead be a dialogue (`messages`), rendered by the chat template."""

    text: str | None = None
    messages: tuple[Message, ...] = ()
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer to a prompt; `rank` 0 is the best and equal ranks are a tie, `score` is higher for better."""

    text: str
    rank: int | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two or more completions of one prompt, all ranked or all scored."""

    prompt: tuple[Message, ...]
    completions: tuple[Completion, ...]
    annotator: str | None = None
    source: str | None = None

    def worth(self) -> list[float]:
        """Higher is better: the score where there is one, else the negated rank."""
        return [c.score if c.score is not None else -float(c.rank or 0) for c in self.completions]

    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) indices of every strictly ordered pair; ties are left out."""
        worth = self.worth()
        n = len(worth)
        return [(i, j) for i in range(n) for j in range(n) if worth[i] > worth[j]]

    def ties(self) -> int:
        n = len(self.completions)
        return n * (n - 1) // 2 - len(self.pairs())


@dataclass(frozen=True, slots=True)
class Rated:
    prompt: tuple[Message, ...]
    completion: str
    desirable: bool
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """`answer` is a reference answer that checks compare with; no policy is shown it or trained on it."""

    id: str
    messages: tuple[Message, ...]
    source: str | None = None
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """Who drew a sample, and from which noise.

    policy, tokenizer, template   digests of the policy that its row opened (in PPO trained on since, `iteration` times)
                                  and of what gave the ids their meaning
    row, seed, iteration          what the noise was keyed by, beside prompt and index; `row` is the stage
    temperature                   of this very draw
    """

    policy: str | None = None
    tokenizer: str | None = None
    template: str | None = None
    row: str | None = None
    seed: int | None = None
    iteration: int = 0
    temperature: float | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """Tokens computed for a sample, never seconds: they differ from run to run.

    prompt   the prompt's, on the first of the samples that it was computed once for, 0 on the others
    new      drawn
    """

    prompt: int = 0
    new: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One generated answer. `ids` end in the stop token when `stopped`; log-probs are aligned with `ids`, or not known
    and empty.

    logprobs       under the distribution that each id was drawn from (temperature, truncation)
    raw_logprobs   under the policy's own, at temperature 1
    scores         by source
    """

    prompt: Prompt
    index: int
    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool
    scores: Mapping[str, float] = field(default_factory=dict)
    raw_logprobs: tuple[float, ...] = ()
    origin: Origin | None = None
    cost: Cost | None = None
