"""Operations of reading, training and sampling, by hand. One operation is an addition or multiplication of a matrix
product; what is no product (norms, look-ups, softmax) counts as nothing.

Training is 6 P D operations for P parameters and D tokens, 2 forward and 4 backward (Kaplan et al. 2020, section 2.1),
8 P D where activations are computed again (Korthikanti et al. 2022, section 5). P are the parameters that stand in
products: an embedding is looked up, its matrix counts where it is the head; of experts those that compute a token
count. Attention adds 12 operations a layer, a
number of the queries and a pair of tokens that see each other (Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.estimate.shape import Model, Shape

FORWARD, BACKWARD = 2, 4  # operations a parameter and token


def training(parameters: float, tokens: float, *, recomputed: bool = False) -> float:
    """6 P D, or 8 P D with recomputation.

    >>> training(10, 100), training(10, 100, recomputed=True)
    (6000, 8000)
    """
    return (FORWARD * (1 + recomputed) + BACKWARD) * parameters * tokens


def pairs(lengths: Iterable[float], before: float = 0) -> float:
    """Pairs of a token and one that it attends to, itself included, of sequences that `before` tokens precede.

    >>> pairs([2, 3]), pairs([2], before=5)
    (9.0, 13.0)
    """
    return sum(n * before + n * (n + 1) / 2 for n in lengths)


def attention(shape: Shape, pairs_seen: float) -> float:
    """Scores and weighted sums of a forward pass, all layers."""
    return 4.0 * shape.layers * shape.queries * pairs_seen


def forward(model: Model, tokens: float, pairs_seen: float, scored: float = 0) -> float:
    """A pass over `tokens`, of which `scored` positions go through the head."""
    shape = model.shape
    head = 0 if model.scalar else shape.table
    adapter = FORWARD * model.own * tokens
    return FORWARD * (shape.computed * tokens + head * scored) + adapter + attention(shape, pairs_seen)


def update(model: Model, tokens: float, pairs_seen: float, scored: float = 0, *, recomputed: bool = False) -> float:
    """Forward and backward. Frozen weights under an adapter have no gradient of their own: 4 P D, not 6 P D."""
    once = forward(model, tokens, pairs_seen, scored)
    trunk_again = forward(model, tokens, pairs_seen) if recomputed else 0.0
    if model.adapter is None:
        return 3 * once + trunk_again
    through_products = 2 * once + attention(model.shape, pairs_seen)  # of attention both sides need gradients
    return through_products + FORWARD * model.own * tokens + trunk_again


def sampling(model: Model, prompts: float, prompt: float, answers: float, answer: float) -> float:
    """Drawing `answers` of `answer` tokens after `prompts` of `prompt` tokens, a prompt read once for its answers."""
    read = prompts * prompt + answers * answer
    seen = prompts * pairs([prompt]) + answers * pairs([answer], before=prompt)
    return forward(model, read, seen, scored=answers * answer)
