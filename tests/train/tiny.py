"""A small model over forests, its loss, and records, shared by the tests of the loop."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.forest import Forest, Group, Segment
from pipeline.train.loop import LossSums
from pipeline.train.randomness import generator

VOCABULARY = 23


class Tiny(nn.Module):
    """Log-probs [T] of every token given the embedding of its predictor: no attention, but every kind of
    layer.
    """

    def __init__(self, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        draw = generator(0, "tiny")
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.norm = nn.LayerNorm(width)
        self.middle = nn.Linear(width, width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)

    def forward(self, forest: Forest) -> Tensor:
        hidden = self.embedding(forest.ids_T)
        hidden = hidden + torch.tanh(self.middle(self.dropout(self.norm(hidden))))
        logprobs = self.head(hidden).float().log_softmax(-1)[forest.predictor_T.clamp(min=0)]
        chosen = logprobs.gather(1, forest.ids_T[:, None])[:, 0]
        return torch.where(forest.predictor_T >= 0, chosen, torch.zeros_like(chosen))


def next_token(module: Callable[..., Any], forest: Forest) -> LossSums:
    """Summed negative log-likelihood of the trained tokens."""
    nll = -module(forest) * forest.weights_T
    trained = forest.weights_T.sum()
    return LossSums({"tokens": nll.sum()}, {"nll": (nll.sum(), trained), "records": (forest.groups, 1)})


def records(n: int, shortest: int = 2, longest: int = 12) -> list[Group]:
    """`n` sequences of unequal lengths; the first token is not trained."""
    draw = generator(1, "records")
    out: list[Group] = []
    for _ in range(n):
        length = int(torch.randint(shortest, longest + 1, (1,), generator=draw))
        ids = torch.randint(VOCABULARY, (length,), generator=draw).tolist()
        out.append([Segment(ids, weights=[0.0] + [1.0] * (length - 1))])
    return out


class Listener:
    """A workspace that remembers what it was told, and keeps checkpoints in `root` where that is given."""

    fingerprint = "0" * 64

    def __init__(self, root: Path | None = None) -> None:
        self._own = None if root else tempfile.TemporaryDirectory()
        self.checkpoints = Path(root or self._own.name) / "checkpoints"  # type: ignore[union-attr]
        self.lines: list[dict[str, Any]] = []
        self.reports: list[tuple[float, float, str, dict[str, Any]]] = []
        self.said: list[str] = []

    def log(self, *, step: int, **metrics: Any) -> None:
        self.lines.append({"step": step, **metrics})

    def metrics_size(self) -> int:
        return len(self.lines)

    def rewind_metrics(self, size: int = 0) -> None:
        del self.lines[size:]

    def progress(self, done: float, total: float, unit: str = "tokens", **figures: Any) -> None:
        self.reports.append((done, total, unit, figures))

    def say(self, text: str) -> None:
        self.said.append(text)
