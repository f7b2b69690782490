"""From logits to the next token: which tokens may be drawn, how likely, and which one it is.

    chooser = Chooser(temperature=0.7, top_p=0.9, stop_ids=(2, 3))
    ids_N, logprobs_N, raw_N = chooser(logits_NV, noise_N)

Scores are made in transformers' order: repetition penalty, stop tokens barred, temperature, top_k, top_p of what is
left, min_p of what is left. A chooser is built once for all steps; what was not asked for costs nothing.

Shapes: N rows, V vocabulary, S stop tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NEVER = float("-inf")


def penalise(scores_NV: Tensor, seen_NV: Tensor, penalty: float) -> Tensor:
    """Scores of seen tokens divided by `penalty` where positive, multiplied where negative.

    Keskar et al. 2019 (CTRL), section 4.1, with the treatment of negative scores that transformers gives it.
    """
    return torch.where(seen_NV, torch.where(scores_NV < 0, scores_NV * penalty, scores_NV / penalty), scores_NV)


def seen_tokens(ids_PT: Tensor, lengths_P: Tensor, vocabulary: int) -> Tensor:
    """[P, V] bool: the tokens of each prompt, without its padding on the right."""
    own_PT = torch.arange(ids_PT.shape[1], device=ids_PT.device) < lengths_P[:, None]
    ids_PT = torch.where(own_PT, ids_PT, ids_PT[:, :1])
    seen = torch.zeros(ids_PT.shape[0], vocabulary, dtype=torch.bool, device=ids_PT.device)
    return seen.scatter_(1, ids_PT, True)


def bar(scores_NV: Tensor, ids_S: Tensor, rows_N: Tensor) -> Tensor:
    """-inf for the tokens `ids_S` in the rows where `rows_N` is true."""
    scores_NV = scores_NV.clone()
    scores_NV[:, ids_S] = scores_NV[:, ids_S].masked_fill(rows_N[:, None], NEVER)
    return scores_NV


def truncate(scores_NV: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Scores with -inf outside the `top_k` highest, outside the smallest set of probability `top_p`, and below `min_p`
    times the highest probability.

    In transformers' order: top_k first, top_p of what is left. Scores equal to the last of the top_k all stay. At
    least one token stays. 0, 1.0 and 0.0 leave everything in. min_p: Nguyen et al. 2024.
    """
    if 0 < top_k < scores_NV.shape[-1]:
        least = scores_NV.topk(top_k, -1).values[..., -1:]
        scores_NV = scores_NV.masked_fill(scores_NV < least, NEVER)
    if top_p < 1.0:
        ordered, index = scores_NV.sort(dim=-1, descending=True, stable=True)
        probs = torch.softmax(ordered, -1)
        before = probs.cumsum(-1) - probs  # probability of everything ranked higher
        out = before >= top_p
        out[..., 0] = False
        scores_NV = scores_NV.masked_fill(torch.zeros_like(out).scatter_(-1, index, out), NEVER)
    if min_p > 0.0:
        probs = torch.softmax(scores_NV, -1)
        scores_NV = scores_NV.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), NEVER)
    return scores_NV


def inverse_cdf(probs_NV: Tensor, noise_N: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the noise in [0, 1): never one of probability 0.

    The noise is stretched to the rounded total, so that a total just below 1 loses no noise. Softmax, cumulative sum
    and search take a twentieth of the time of `torch.multinomial` on a CPU.
    """
    cdf = probs_NV.cumsum(-1)
    ids = torch.searchsorted(cdf, noise_N[:, None] * cdf[:, -1:], right=True)
    return ids[:, 0].clamp_(max=probs_NV.shape[-1] - 1)


class Chooser:
    """Draws tokens under one set of options, which are those of `pipeline.rollout.engine.SamplingSettings`.

    Temperature 0 takes the highest score (the lowest id of a tie) and leaves top_k, top_p and min_p aside.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop_ids: Tensor | Sequence[int] = (),
    ) -> None:
        self.temperature, self.penalty = temperature, repetition_penalty
        self.cut = (top_k, top_p, min_p)
        self.cuts = self.cut != (0, 1.0, 0.0)
        self.stop_ids = torch.as_tensor(stop_ids, dtype=torch.int64)

    def allowed(self, logits_NV: Tensor, early_N: Tensor | None = None, seen_NV: Tensor | None = None) -> Tensor:
        """Scores before temperature: seen tokens penalised, stop tokens barred in the rows of `early_N`."""
        scores = logits_NV if seen_NV is None else penalise(logits_NV, seen_NV, self.penalty)
        return scores if early_N is None else bar(scores, self.stop_ids, early_N)

    def scores(self, logits_NV: Tensor, early_N: Tensor | None = None, seen_NV: Tensor | None = None) -> Tensor:
        """The scores whose softmax is the sampling distribution (temperature above 0)."""
        scores = self.allowed(logits_NV, early_N, seen_NV)
        if self.temperature != 1.0:
            scores = scores / self.temperature
        return truncate(scores, *self.cut) if self.cuts else scores

    def __call__(
        self, logits_NV: Tensor, noise_N: Tensor, early_N: Tensor | None = None, seen_NV: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Next tokens [N], their log-probs under the sampling distribution and under the raw one (temperature 1).

        early_N  [N] bool: rows in which no stop token may be drawn yet
        seen_NV  [N, V] bool: tokens that the repetition penalty is for

        Greedy: the sampling log-prob is 0, the token was certain.
        """
        raw_NV = torch.log_softmax(logits_NV, -1)
        if self.temperature == 0.0:
            at = self.allowed(logits_NV, early_N, seen_NV).argmax(-1, keepdim=True)
            raw_N = raw_NV.gather(1, at)[:, 0]
            return at[:, 0], torch.zeros_like(raw_N), raw_N
        scores_NV = self.scores(logits_NV, early_N, seen_NV)
        own_NV = raw_NV if scores_NV is logits_NV else torch.log_softmax(scores_NV, -1)
        ids_N = inverse_cdf(own_NV.exp(), noise_N)
        at = ids_N[:, None]
        raw_N = raw_NV.gather(1, at)[:, 0]
        return ids_N, raw_N if own_NV is raw_NV else own_NV.gather(1, at)[:, 0], raw_N
