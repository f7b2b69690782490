"""A tokenizer of single characters, models of two thin layers over it, and their artifacts: shared by many tests."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from pipeline.data.chat import ChatFormat
from pipeline.data.records import Comparison, Completion, Message, Prompt
from pipeline.flow.artifacts import KINDS, Artifact, describe
from pipeline.llama.heads import PolicyModel, ScalarModel
from pipeline.llama.make import new_classifier, new_policy
from pipeline.llama.open import Trainable
from pipeline.llama.presets import ModelSettings
from pipeline.llama.save import save_model
from pipeline.llama.tokenizer import train_tokenizer


@cache
def chat() -> ChatFormat:
    """Every ASCII character is one token: a user turn of n characters in a prompt has n + 4."""
    return ChatFormat(train_tokenizer([], 264))


def ask(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(f"p{i}", ask(text)) for i, text in enumerate(texts)]


def comparison(prompt: str, *answers: str, scores: list[float] | None = None) -> Comparison:
    """Ranked as they come, the best first, unless scores are given."""
    worth = [{"rank": i} for i in range(len(answers))] if scores is None else [{"score": s} for s in scores]
    return Comparison(ask(prompt), tuple(Completion(text, **w) for text, w in zip(answers, worth, strict=True)))


def policy(seed: int = 0, spread: float = 0.1, **shape: Any) -> Trainable:
    """A policy in evaluation mode without gradients switched off."""
    settings = ModelSettings(preset="test", initializer_range=spread, **shape)
    model = new_policy(settings, chat().tokenizer, chat().stop_ids, seed).eval()
    return Trainable(PolicyModel(model).eval(), model, chat().tokenizer, chat(), None)


def scorer(seed: int = 0, **shape: Any) -> Trainable:
    """A reward model over a policy of that seed."""
    model = new_classifier(policy(seed, **shape).model, seed).eval()
    return Trainable(ScalarModel(model).eval(), model, chat().tokenizer, chat(), None)


def save(directory: Path, kind: str, model: Any, base: Artifact | None = None) -> Any:
    """A model artifact of files in `directory`."""
    save_model(model, chat().tokenizer, directory, base_digest=base.digest if base else None)
    return artifact(directory, kind, bases={base.digest: base.path, **base.bases} if base else {})


def artifact(directory: Path, kind: str, bases: dict[str, Path] | None = None, **facts: Any) -> Any:
    """What the store would open of a finished slot."""
    meta = describe(directory, kind, facts)
    return KINDS[kind](directory, tuple(meta["files"]), meta["digest"], meta["lineage"], meta, bases=bases or {})


def forget_gradients(role: Trainable) -> Trainable:
    role.module.requires_grad_(False)
    return role


class Listener:
    """A workspace that remembers what it was told."""

    rank = 0

    def __init__(self, skip_bad: bool = False, directory: Path | None = None) -> None:
        self.skip_bad, self.directory = skip_bad, directory
        self.lines: list[dict[str, Any]] = []
        self.said: list[str] = []

    def log(self, *, step: int, **metrics: Any) -> None:
        self.lines.append({"step": step, **metrics})

    def progress(self, done: float, total: float | None = None, unit: str = "tokens", **figures: Any) -> None:
        pass

    def say(self, text: str) -> None:
        self.said.append(text)

    def quarantine(self, name: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{name}.jsonl"


def same(values: Any, expected: Any, atol: float = 1e-6) -> None:
    torch.testing.assert_close(
        torch.as_tensor(values, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64), atol=atol, rtol=0
    )


def outputs(**values: Any) -> SimpleNamespace:
    """What a fake module returns of a forest."""
    return SimpleNamespace(**values)
