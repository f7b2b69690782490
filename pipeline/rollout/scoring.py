"""Scores and log-probs of generated answers, each prompt computed once for all of its answers.

A group is a prompt and its answers, as ids: ([1, 4, 20], [[7, 9, 2], [8, 2]]). It becomes the token forest
[prompt] <- [answer 1] ... [answer K]; groups share a forest up to a token budget. A group that alone exceeds
the budget is split, its prompt repeated: everything here is one number a sample or a token, so results do not
change.

Shapes: T tokens and S segments of a forest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.data.forest import Forest, Segment, build
from pipeline.flow.errors import UserError
from pipeline.llama.heads import at_last

Ids = Sequence[int]
Answers = tuple[Ids, Sequence[Ids]]  # a prompt and its answers
Piece = tuple[int, int, int]  # group, first answer, one past the last


def score_samples(
    model: nn.Module, prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]], token_budget: int = 8192
) -> list[list[float]]:
    """The scalar model's score at the last real token of each answer (of the prompt, where an answer is
    empty).

    `model(forest)` returns [T] (`pipeline.llama.heads.ScalarModel`).
    """
    groups = list(zip(prompts, answers, strict=True))
    scores: list[list[float]] = [[0.0] * len(own) for own in answers]

    def read(forest: Forest, pieces: list[Piece]) -> None:
        at = at_last(model(forest), forest).tolist()
        for (group, first, last), segment in zip(pieces, _first_answers(pieces), strict=True):
            scores[group][first:last] = at[segment : segment + last - first]

    _each_forest(model, groups, token_budget, read)
    return scores


def token_logprobs(
    model: nn.Module, groups: Sequence[Answers], temperature: float = 1.0, token_budget: int = 8192
) -> list[list[Tensor]]:
    """Log-probs of every token of every answer, float32 on the CPU, under the softmax of logits /
    temperature.

    `model(forest, temperature=...)` returns `.logprobs_T` (`pipeline.llama.heads.PolicyModel`). They equal a
    sampler's log-probs where it neither truncated nor forbade tokens.
    """
    if temperature <= 0:
        raise UserError(f"temperature {temperature}: log-probs need a temperature above 0")
    found: list[list[Tensor]] = [[torch.empty(0)] * len(own) for _, own in groups]

    def read(forest: Forest, pieces: list[Piece]) -> None:
        logprobs_T = model(forest, temperature=temperature).logprobs_T.float().cpu()
        by_segment = logprobs_T.split(forest.length_S.tolist())
        for (group, first, last), segment in zip(pieces, _first_answers(pieces), strict=True):
            found[group][first:last] = [x.clone() for x in by_segment[segment : segment + last - first]]

    _each_forest(model, groups, token_budget, read)
    return found


def _first_answers(pieces: list[Piece]) -> Iterator[int]:
    """The segment of each piece's first answer: a piece is its prompt's segment and those of its answers."""
    at = 0
    for _, first, last in pieces:
        yield at + 1
        at += 1 + last - first


def _each_forest(
    model: nn.Module,
    groups: Sequence[Answers],
    token_budget: int,
    read: Callable[[Forest, list[Piece]], None],
) -> None:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with frozen(model):
        for pieces in _batches(groups, token_budget):
            forest = build([_segments(groups[g], first, last) for g, first, last in pieces])
            read(forest.to(device), pieces)


def _segments(group: Answers, first: int, last: int) -> list[Segment]:
    prompt, answers = group
    return [Segment(prompt), *(Segment(ids, 0, weights=[1.0] * len(ids)) for ids in answers[first:last])]


def _batches(groups: Sequence[Answers], token_budget: int) -> Iterator[list[Piece]]:
    """Pieces of groups in batches of at most `token_budget` tokens, groups of similar size together."""

    def tokens(piece: Piece) -> int:
        prompt, answers = groups[piece[0]]
        return len(prompt) + sum(map(len, answers[piece[1] : piece[2]]))

    pieces = [piece for g, group in enumerate(groups) for piece in _split(g, group, token_budget)]
    batch: list[Piece] = []
    used = 0
    for piece in sorted(pieces, key=tokens):
        n = tokens(piece)
        if batch and used + n > token_budget:
            yield batch
            batch, used = [], 0
        batch.append(piece)
        used += n
    if batch:
        yield batch


def _split(number: int, group: Answers, token_budget: int) -> Iterator[Piece]:
    prompt, answers = group
    first, used = 0, len(prompt)
    for i, ids in enumerate(answers):
        if len(prompt) + len(ids) > token_budget:
            raise UserError(
                f"prompt {number}: with answer {i} it has {len(prompt) + len(ids)} tokens, more than the "
                f"token budget of {token_budget}: raise token_budget"
            )
        if used + len(ids) > token_budget:
            yield number, first, i
            first, used = i, len(prompt)
        used += len(ids)
    if first < len(answers):
        yield number, first, len(answers)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout, each module's mode as before afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
