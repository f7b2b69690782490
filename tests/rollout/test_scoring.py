from __future__ import annotations

import pytest
import torch
import transformers

from pipeline.flow.errors import UserError
from pipeline.llama import modeling
from pipeline.llama.heads import PolicyModel, ScalarModel
from pipeline.rollout.scoring import score_samples, token_logprobs

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
ANSWERS = [[[20, 21], [], [22, 23, 24]], [], [[30], [31, 32]]]


def config():
    return transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        attention_dropout=0.1,
        num_labels=1,
        pad_token_id=0,
    )


@pytest.mark.parametrize("token_budget", [1000, 12, 7])
def test_scores_stand_at_the_last_real_token(token_budget):
    """Whole groups, split groups and single answers give the same; an empty answer has its prompt's score."""
    torch.manual_seed(0)
    model = modeling.LlamaForSequenceClassification(config())
    scores = score_samples(ScalarModel(model).train(), PROMPTS, ANSWERS, token_budget)
    model.eval()
    assert [len(s) for s in scores] == [3, 0, 2]
    for prompt, answers, own in zip(PROMPTS, ANSWERS, scores, strict=True):
        for answer, score in zip(answers, own, strict=True):
            ids = torch.tensor([prompt + answer])
            alone = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.item()
            assert score == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("token_budget", [1000, 12, 7])
def test_logprobs_of_every_answer_token(token_budget):
    torch.manual_seed(0)
    model = modeling.LlamaForCausalLM(config())
    module = PolicyModel(model).train()
    groups = list(zip(PROMPTS, ANSWERS, strict=True))
    found = token_logprobs(module, groups, temperature=0.5, token_budget=token_budget)
    assert module.training and model.training
    model.eval()
    for (prompt, answers), own in zip(groups, found, strict=True):
        assert len(own) == len(answers)
        for answer, logprobs in zip(answers, own, strict=True):
            ids = prompt + answer
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            expected = torch.log_softmax(logits / 0.5, -1).gather(1, torch.tensor(answer).long()[:, None])
            torch.testing.assert_close(logprobs, expected[:, 0].detach(), atol=1e-5, rtol=0)


def test_what_cannot_be_computed_is_refused():
    torch.manual_seed(0)
    model = ScalarModel(modeling.LlamaForSequenceClassification(config()))
    with pytest.raises(UserError, match="prompt 0: with answer 2 it has 6 tokens"):
        score_samples(model, PROMPTS, ANSWERS, 5)
    with pytest.raises(UserError, match="above 0"):
        token_logprobs(model, [([1], [[2]])], temperature=0.0)
    assert score_samples(model, [], []) == []
