"""Models made new: random policies, heads, rows for words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.data.forest import Segment, build
from pipeline.flow.errors import UserError
from pipeline.llama.make import fold_scale, grow_vocabulary, new_classifier
from pipeline.llama.modeling import LlamaForSequenceClassification
from pipeline.llama.open import open_trainable_classifier
from tests.llama.conftest import at, policy


def test_new_policies_follow_the_seed_alone(tokenizer) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b, c = policy(tokenizer, 0), policy(tokenizer, 0), policy(tokenizer, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    assert a.config.vocab_size == len(tokenizer) and a.config.pad_token_id == 0
    assert a.generation_config.eos_token_id == [7, 2]


def test_a_new_head_has_the_documented_spread_and_follows_its_seed(tokenizer) -> None:
    wide = policy(tokenizer, hidden_size=512, intermediate_size=8, num_hidden_layers=1)
    heads = [new_classifier(wide, seed).score.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    spread = torch.cat([new_classifier(wide, seed).score.weight for seed in range(20)]).std()
    assert abs(float(spread.detach()) * 513**0.5 - 1) < 0.05
    classifier = new_classifier(wide, 0)
    assert type(classifier) is LlamaForSequenceClassification and classifier.config.num_labels == 1
    assert not any(p.is_meta for p in classifier.parameters())


def test_folding_the_scale_normalises_scores(stored: Path) -> None:
    forest = build(
        [[Segment([1, 20, 30, 40], weights=[1.0] * 4), Segment([50, 60], 0, weights=[1.0] * 2), Segment([70], 0)]]
    )
    critic = open_trainable_classifier(at(stored), None, seed=3)
    scores = critic.module(forest).detach()
    mean, std = float(scores.mean()), float(scores.std(unbiased=False))
    shift = fold_scale(critic.model, mean, std)
    found = critic.module(forest) + shift
    assert abs(float(found.mean().detach())) < 1e-5 and abs(float(found.std(unbiased=False).detach()) - 1) < 1e-5
    with pytest.raises(UserError, match="scored alike"):
        fold_scale(critic.model, 0.0, 0.0)


@pytest.mark.parametrize("tied", [False, True])
def test_growing_the_vocabulary_keeps_old_rows(tied: bool, tokenizer) -> None:
    grown = [policy(tokenizer, tie_word_embeddings=tied) for _ in range(2)]
    before = grown[0].get_input_embeddings().weight.detach().clone()
    for model in grown:
        grow_vocabulary(model, len(before) + 5, seed=1)
    for table in (grown[0].get_input_embeddings().weight, grown[0].get_output_embeddings().weight):
        assert table.shape[0] == len(before) + 5 and table[-5:].abs().max() > 0
    assert torch.equal(grown[0].get_input_embeddings().weight[: len(before)], before)
    assert torch.equal(*(m.get_input_embeddings().weight for m in grown))
    assert grown[0].config.vocab_size == len(before) + 5
    with pytest.raises(UserError, match="does not belong"):
        grow_vocabulary(grown[0], 3, seed=1)
