"""The one batch type: a flat run of tokens without padding, cut into segments that may continue a parent.

    packed documents     [d1][d2][d3]                    segments without parents
    a dialogue           [whole conversation]            one segment
    a comparison         [prompt] <- [chosen] [rejected] two children of one prompt
    a K-wise ranking     [prompt] <- [y1] ... [yK]       K children, the prompt computed once
    a tree of replies    deeper parents                  the same

A token attends to its ancestors and, causally, to its own segment. Positions continue from the parent.
Every token has a `predictor`: the index whose hidden state predicts it: the one before it, or, for the first
token of a segment, its parent's last token (which all children share), or -1 where nothing precedes it.
A flat shift by one is therefore wrong; losses, log-probs and values gather by `predictor_T`.

Shapes: T tokens in the batch, S segments, G groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens. `parent` indexes the group's own list and stands before its children.

    weights   loss weight of each token (0: not trained); None means 0 everywhere
    tokens    further values by token, aligned with `ids` (old log-probs, advantages, round numbers ...)
    facts     values of the whole segment (a score, a pair number ...)
    """

    ids: Sequence[int]
    parent: int = -1
    weights: Sequence[float] | None = None
    tokens: Mapping[str, Sequence[float]] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)


Group = Sequence[Segment]  # segments that must stay in one micro-batch


@dataclass(frozen=True)
class Forest:
    ids_T: Tensor  # int64
    positions_T: Tensor  # int64
    predictor_T: Tensor  # int64, -1 where nothing precedes
    segment_T: Tensor  # int64, the segment of each token
    weights_T: Tensor  # float32, loss weights
    start_S: Tensor  # int64, first token of each segment
    length_S: Tensor  # int64, may be 0
    parent_S: Tensor  # int64, -1 for roots
    group_S: Tensor  # int64
    last_S: Tensor  # int64, last token of the segment, of its nearest non-empty ancestor if it is empty, or -1
    tokens: dict[str, Tensor] = field(default_factory=dict)  # float32 by token
    facts: dict[str, Tensor] = field(default_factory=dict)  # float32 by segment
    cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # e.g. the attention plan

    def __len__(self) -> int:
        return int(self.ids_T.numel())

    @property
    def groups(self) -> int:
        return int(self.group_S[-1]) + 1 if self.group_S.numel() else 0

    def to(self, device: torch.device | str) -> Forest:
        if self.ids_T.device == torch.device(device):
            return self
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name.endswith(("_T", "_S"))}
        return replace(
            self,
            **moved,
            tokens={k: v.to(device) for k, v in self.tokens.items()},
            facts={k: v.to(device) for k, v in self.facts.items()},
            cache={},
        )

    def with_tokens(self, **values: Tensor) -> Forest:
        """The same forest with further values by token; what is cached for attention is shared."""
        return replace(self, tokens={**self.tokens, **values})


def build(groups: Iterable[Group]) -> Forest:
    """Lay groups out one after another. Raises ValueError on a parent that does not stand before its child."""
    ids: list[int] = []
    positions: list[int] = []
    predictor: list[int] = []
    segment_of: list[int] = []
    weights: list[float] = []
    start: list[int] = []
    length: list[int] = []
    parent: list[int] = []
    group: list[int] = []
    last: list[int] = []
    depth: list[int] = []  # tokens up to and including the segment
    tokens: dict[str, list[float]] = {}
    facts: dict[str, list[float]] = {}
    for g, segments in enumerate(groups):
        base = len(start)
        for i, s in enumerate(segments):
            if not -1 <= s.parent < i:
                raise ValueError(f"segment {i} of group {g}: parent {s.parent} must stand before it")
            n, at, number = len(s.ids), len(ids), len(start)
            up = base + s.parent if s.parent >= 0 else -1
            before = depth[up] if up >= 0 else 0
            ids.extend(s.ids)
            positions.extend(range(before, before + n))
            if n:
                predictor.append(last[up] if up >= 0 else -1)
                predictor.extend(range(at, at + n - 1))
            segment_of.extend([number] * n)
            _extend(weights, s.weights, at, n, "weights")
            for name, values in s.tokens.items():
                _extend(tokens.setdefault(name, []), values, at, n, name)
            for name, value in s.facts.items():
                column = facts.setdefault(name, [])
                column.extend([0.0] * (number - len(column)))
                column.append(float(value))
            start.append(at)
            length.append(n)
            parent.append(up)
            group.append(g)
            depth.append(before + n)
            last.append(at + n - 1 if n else (last[up] if up >= 0 else -1))

    def ints(xs: list[int]) -> Tensor:
        return torch.tensor(xs, dtype=torch.int64)

    def floats(xs: list[float], n: int) -> Tensor:
        return torch.tensor(xs + [0.0] * (n - len(xs)), dtype=torch.float32)

    return Forest(
        ids_T=ints(ids),
        positions_T=ints(positions),
        predictor_T=ints(predictor),
        segment_T=ints(segment_of),
        weights_T=floats(weights, len(ids)),
        start_S=ints(start),
        length_S=ints(length),
        parent_S=ints(parent),
        group_S=ints(group),
        last_S=ints(last),
        tokens={k: floats(v, len(ids)) for k, v in tokens.items()},
        facts={k: floats(v, len(start)) for k, v in facts.items()},
    )


def roots(ids_T: Tensor, length_S: Tensor) -> Forest:
    """Sequences without parents, each at least one token long, as `build` lays them out, without its loops."""
    start = length_S.cumsum(0) - length_S
    number = torch.arange(length_S.numel(), device=ids_T.device)
    segment = number.repeat_interleave(length_S)
    at = torch.arange(ids_T.numel(), device=ids_T.device)
    positions = at - start[segment]
    return Forest(
        ids_T=ids_T,
        positions_T=positions,
        predictor_T=torch.where(positions > 0, at - 1, -1),
        segment_T=segment,
        weights_T=torch.zeros(ids_T.numel(), device=ids_T.device),
        start_S=start,
        length_S=length_S,
        parent_S=torch.full_like(start, -1),
        group_S=number,
        last_S=start + length_S - 1,
    )


def _extend(column: list[float], values: Sequence[float] | None, at: int, n: int, name: str) -> None:
    column.extend([0.0] * (at - len(column)))
    if values is None:
        column.extend([0.0] * n)
    elif len(values) != n:
        raise ValueError(f"{name}: {len(values)} values for {n} tokens")
    else:
        column.extend(values)


def size(group: Group) -> int:
    return sum(len(s.ids) for s in group)


def cut(groups: Sequence[Group], token_budget: int) -> Iterator[list[Group]]:
    """Micro-batches of whole groups, in order, each of at most `token_budget` tokens.

    Raises ValueError naming the group that alone exceeds the budget.
    """
    batch: list[Group] = []
    used = 0
    for number, group in enumerate(groups):
        n = size(group)
        if n > token_budget:
            raise ValueError(
                f"group {number} has {n} tokens, more than the token budget of {token_budget}: "
                "raise train.token_budget or shorten the record (max_tokens)"
            )
        if batch and used + n > token_budget:
            yield batch
            batch, used = [], 0
        batch.append(group)
        used += n
    if batch:
        yield batch
