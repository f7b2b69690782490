"""Log-probabilities of given tokens from the hidden states that predict them.

The head is applied to the chosen states only, float32 from the logits on, and in chunks over positions whose logits
are computed again in the backward pass, so that [N, V] is never held in full for a large vocabulary.

Shapes: N chosen positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.algo.kl import exact_kl
from pipeline.llama import kernel
from pipeline.llama.attention import filled

# Logits held at once, in elements: 64 MiB in float32. Up to this size computing them twice would only cost time.
CHUNK_ELEMENTS = 1 << 24


class _Chosen(torch.autograd.Function):
    """log softmax(logits / temperature) at `ids`, and the entropy, keeping one [N, V] tensor: the logits where the
    kernel computes them in one pass over memory each way, otherwise float32 log-probs."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.settings = (temperature, logits.dtype)
        ctx.set_materialize_grads(False)  # an entropy that is only looked at costs nothing in the backward pass
        ctx.compiled = len(logits) > 0 and kernel.takes(logits, logits.shape[-1])
        if ctx.compiled:
            logits, ids = logits.contiguous(), ids.contiguous()
            normaliser, own = (torch.empty(len(ids), *more, dtype=torch.float32) for more in ((2,), ()))
            spread = torch.empty_like(own) if entropy else None
            kernel.chosen(logits, ids, temperature, normaliser, own, spread)
            ctx.save_for_backward(logits, ids, spread, normaliser)
            return own, spread
        scaled = logits if temperature == 1.0 else logits.float() / temperature
        logp = torch.log_softmax(scaled, -1, dtype=torch.float32)
        spread = torch.linalg.vecdot(logp.exp(), logp).neg_() if entropy else None
        ctx.save_for_backward(logp, ids, spread, None)
        return logp.gather(1, ids[:, None]).squeeze(1), spread

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor, None, None, None]:
        """d logp_y / d logit_v = [v = y] - p_v;  d H / d logit_v = -p_v (logp_v + H)."""
        logp, ids, spread, normaliser = ctx.saved_tensors
        temperature, dtype = ctx.settings
        if ctx.compiled:
            grads = [None if g is None else g.float().contiguous() for g in (grad, grad_entropy)]
            return kernel.chosen_gradient(logp, ids, temperature, normaliser, spread, *grads), None, None, None
        result = logp.exp()
        grad = logp.new_zeros(len(logp)) if grad is None else grad
        if grad_entropy is None:
            result.mul_(-grad[:, None])
        else:
            weight = torch.addcmul((-grad - grad_entropy * spread)[:, None], logp, grad_entropy[:, None], value=-1)
            result.mul_(weight)
        result.scatter_add_(1, ids[:, None], grad[:, None])
        if temperature != 1.0:
            result.div_(temperature)
        return result.to(dtype), None, None, None


def chosen_logprobs(
    logits_NV: Tensor, ids_N: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """float32 log-probs [N] of `ids_N` under softmax(logits / temperature), and entropies [N] in nats if asked."""
    return _Chosen.apply(logits_NV, ids_N, temperature, entropy)


def likeliest(logits_NV: Tensor, ids_N: Tensor) -> Tensor:
    """float32 [N]: 1 where the given token is the likeliest, without gradient."""
    return (logits_NV.detach().argmax(-1) == ids_N).float()


def token_logprobs(
    hidden_ND: Tensor,
    head: Callable[[Tensor], Tensor],
    ids_N: Tensor,
    vocabulary: int,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    accuracy: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`chosen_logprobs` of head(hidden) and `likeliest` if asked, in chunks of at most `chunk_elements` logits."""

    def compute(hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        logits = head(hidden)
        correct = likeliest(logits, ids) if accuracy else None
        return *chosen_logprobs(logits, ids, temperature=temperature, entropy=entropy), correct

    rows = max(1, chunk_elements // vocabulary)
    hidden, ids = filled(hidden_ND), filled(ids_N)
    if len(ids) <= rows:
        logp, spread, correct = compute(hidden, ids)
    else:
        parts = [
            checkpoint(compute, h, i, use_reentrant=False, preserve_rng_state=False)
            for h, i in zip(hidden.split(rows), ids.split(rows), strict=True)
        ]
        logps, spreads, corrects = zip(*parts, strict=True)
        logp = torch.cat(logps)
        spread, correct = torch.cat(spreads) if entropy else None, torch.cat(corrects) if accuracy else None
    n = len(ids_N)
    return logp[:n], None if spread is None else spread[:n], None if correct is None else correct[:n]


def token_kl(
    hidden_ND: Tensor,
    head: Callable[[Tensor], Tensor],
    reference_ND: Tensor,
    reference_head: Callable[[Tensor], Tensor],
    vocabulary: int,
    *,
    temperature: float = 1.0,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """float32 [N], nats: KL(policy || reference) over the vocabulary at temperature-scaled logits, in chunks.

    The gradient goes to `hidden_ND` and `head` alone.
    """

    def compute(hidden: Tensor, base: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = reference_head(base).float() / temperature
        return exact_kl(head(hidden).float() / temperature, theirs)

    rows = max(1, chunk_elements // (2 * vocabulary))
    hidden, base = filled(hidden_ND), filled(reference_ND)
    if len(hidden) <= rows:
        return compute(hidden, base)[: len(hidden_ND)]
    parts = [
        checkpoint(compute, h, b, use_reentrant=False, preserve_rng_state=False)
        for h, b in zip(hidden.split(rows), base.split(rows), strict=True)
    ]
    return torch.cat(parts)[: len(hidden_ND)]
