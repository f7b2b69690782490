"""How far back a policy reads: perplexity by position, and retrieval of a pass key by its place and the text's length.

    by_position(role, documents, measures, token_budget)
    [{"from": 0, "to": 128, "tokens": 25200, "perplexity": 3.1}, ...]

    passkeys(role, documents, measures, seed, token_budget)
    [{"length": 256, "depth": 0.0, "trials": 20, "accuracy": 0.95, "nll": 0.11}, ...]

The same texts, keys and places for every policy of a tokenizer, in every process: they follow from the seed and the
documents. A key is retrieved where every token of it is the likeliest one after those before it, which is what greedy
decoding would write.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from pipeline.data.chat import ChatFormat
from pipeline.data.forest import Forest, Group, Segment, build, cut
from pipeline.data.groups import document_groups, sum_by_segment
from pipeline.data.passkey import QUESTION, draw_key, filler, hide, statement
from pipeline.data.records import Document
from pipeline.data.template import encode_texts
from pipeline.evaluate.context_settings import ContextMeasures
from pipeline.flow.errors import UserError
from pipeline.llama.heads import PolicyModel
from pipeline.llama.make import repositioned
from pipeline.llama.open import Trainable


def context_figures(
    role: Trainable, documents: Sequence[Document], measures: ContextMeasures, seed: int, token_budget: int
) -> dict[str, Any]:
    """Both tables, as an evaluation row records them by policy."""
    return {
        "positions": by_position(role, documents, measures, token_budget),
        "passkey": passkeys(role, documents, measures, seed, token_budget),
    }


def untrained_figures(
    role: Trainable, documents: Sequence[Document], measures: ContextMeasures, seed: int, token_budget: int
) -> dict[str, Any]:
    """The same of one policy under each of `measures.untrained`: what other positions do by themselves."""
    found = {}
    for name, settings in measures.untrained.items():
        module = PolicyModel(repositioned(role, settings)).requires_grad_(False).eval()
        module.to(next(role.module.parameters()).device)
        found[name] = context_figures(replace(role, module=module), documents, measures, seed, token_budget)
    return found


@torch.no_grad()
def by_position(
    role: Trainable, documents: Sequence[Document], measures: ContextMeasures, token_budget: int
) -> list[dict[str, Any]]:
    """exp of the mean negative log-prob of the tokens at each bucket of positions; a window's first token has none."""
    groups = document_groups(documents, role.chat, measures.max_tokens).groups
    count = -(-measures.max_tokens // measures.bucket)
    total, tokens = torch.zeros(2, count, dtype=torch.float64)
    for forest in _forests(role, groups, token_budget):
        logprobs = role.module(forest).logprobs_T.double()
        at = forest.positions_T // measures.bucket
        total.index_add_(0, at.cpu(), -(logprobs * forest.weights_T).cpu())
        tokens.index_add_(0, at.cpu(), forest.weights_T.double().cpu())
    return [
        {
            "from": b * measures.bucket,
            "to": min((b + 1) * measures.bucket, measures.max_tokens),
            "tokens": int(tokens[b]),
            "perplexity": math.exp(float(total[b] / tokens[b])),
        }
        for b in range(count)
        if tokens[b]
    ]


@torch.no_grad()
def passkeys(
    role: Trainable, documents: Sequence[Document], measures: ContextMeasures, seed: int, token_budget: int
) -> list[dict[str, Any]]:
    """By length and depth the share of keys that are retrieved, and the mean negative log-prob of a token of a key."""
    sentences = encode_texts(role.chat.tokenizer, filler([d.text for d in documents if d.text]))
    if measures.passkey and not sentences:
        raise UserError("documents: no sentence to hide a pass key among; give texts, or set context.passkey to []")
    rows = []
    for length in measures.passkey:
        for depth in measures.places:
            groups = [
                passkey_group(role.chat, sentences, measures.words, length, depth, f"{seed}/{length}/{depth}/{trial}")
                for trial in range(measures.trials)
            ]
            right, nll = _retrieved(role, groups, token_budget)
            rows.append({"length": length, "depth": depth, "trials": len(groups), "accuracy": right, "nll": nll})
    return rows


def passkey_group(
    chat: ChatFormat, sentences: Sequence[Sequence[int]], words: int, length: int, depth: float, draw: str
) -> Group:
    """A text of `length` tokens that ends with the key, whose tokens alone have weight."""
    rng = random.Random(draw)
    key = draw_key(rng, words)
    needle, asked, answer = encode_texts(chat.tokenizer, [f" {statement(key)}", f" {QUESTION}", f" {key}"])
    head = [] if chat.bos_id is None else [chat.bos_id]
    room = length - len(head) - len(asked) - len(answer)
    try:
        text = hide(sentences, needle, room, depth, rng.randrange(len(sentences)))
    except ValueError as problem:
        raise UserError(f"evaluate.context.passkey: {length} tokens: {problem}; raise it") from problem
    ids = [*head, *text, *asked, *answer]
    return [Segment(ids, weights=[0.0] * (length - len(answer)) + [1.0] * len(answer))]


def _retrieved(role: Trainable, groups: Sequence[Group], token_budget: int) -> tuple[float, float]:
    right = keys = 0
    nll = tokens = 0.0
    for forest in _forests(role, groups, token_budget):
        out = role.module(forest, accuracy=True)
        wrong_S = sum_by_segment((1 - out.correct_T) * forest.weights_T, forest)
        right += int((wrong_S == 0).sum())
        keys += len(wrong_S)
        nll -= float((out.logprobs_T.double() * forest.weights_T).sum())
        tokens += float(forest.weights_T.sum())
    return right / keys, nll / tokens


def _forests(role: Trainable, groups: Sequence[Group], token_budget: int) -> Iterator[Forest]:
    device = next(role.module.parameters()).device
    for batch in cut(sorted(groups, key=lambda g: len(g[0].ids), reverse=True), token_budget):
        yield build(batch).to(device)
