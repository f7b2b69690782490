"""A reward model in use: proven to be the one that was trained, and read at the right place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.data.groups import comparison_groups, continuations
from pipeline.data.records import Prompt, Sample
from pipeline.flow.errors import Damaged
from pipeline.llama.adapters import LoraSettings, add_adapter
from pipeline.llama.heads import ScalarModel
from pipeline.llama.make import score_layer
from pipeline.rollout.reward import Reward, open_reward, raw_scores, score_texts, verify_probe, write_probe
from pipeline.rollout.scoring import score_samples
from tests.small import artifact, ask, chat, comparison, save, scorer

GROUPS = comparison_groups([comparison(f"q{i}", "good", "bad" * i) for i in range(12)], chat(), 99).groups


def stored(directory: Path, shift: float = -0.25):
    role = scorer(1)
    save(directory, "reward_model", role.model)
    write_probe(role.module, GROUPS, directory)
    return role, artifact(directory, "reward_model", shift=shift)


def test_what_was_trained_is_what_is_opened(tmp_path: Path):
    role, made = stored(tmp_path / "model")
    reward = open_reward(made)
    assert reward.shift == -0.25
    assert raw_scores(reward.model, GROUPS) == pytest.approx(raw_scores(role.module, GROUPS), abs=1e-6)
    assert not any(p.requires_grad for p in reward.model.parameters())
    body = json.loads((tmp_path / "model" / "probe.json").read_text())
    assert len(body["groups"]) == 8 and len(body["scores"]) == 16


@pytest.mark.parametrize("what", ["head", "trunk", "fresh"])
def test_another_model_is_refused(tmp_path: Path, what: str):
    role, _ = stored(tmp_path)
    with torch.no_grad():
        if what == "fresh":
            score_layer(role.model).weight.copy_(torch.randn(1, 32) / 33**0.5)
        else:
            weight = score_layer(role.model).weight if what == "head" else role.model.model.norm.weight
            weight.mul_(1.001)
    with pytest.raises(Damaged, match="its head or its weights are not those that were trained"):
        verify_probe(role.module, tmp_path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", "{}", '{"groups": [[]], "scores": []}', '{"groups": [[[10000000]]], "scores": [0]}',
             '{"groups": [[[1], [2]]], "scores": []}', '{"groups": 5, "scores": 5}']
)  # fmt: skip
def test_a_probe_of_strangers_is_damage(tmp_path: Path, text: str):
    role = scorer()
    (tmp_path / "probe.json").write_text(text)
    with pytest.raises(Damaged, match=r"probe\.json: "):
        verify_probe(role.module, tmp_path)


def test_without_its_probe_nothing_is_proven(tmp_path: Path):
    role, _ = stored(tmp_path)
    (tmp_path / "probe.json").unlink()
    with pytest.raises(Damaged, match=r"probe\.json: missing"):
        verify_probe(role.module, tmp_path)


def test_scores_are_taken_without_dropout(tmp_path: Path):
    """A module comes from training in train mode: its stored scores must be those that others reproduce."""
    role = scorer(1)
    module = ScalarModel(add_adapter(role.model, LoraSettings(rank=2, dropout=0.5), 0)).train()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    write_probe(module, GROUPS, tmp_path)
    assert module.training
    verify_probe(module.eval(), tmp_path)


def sample(text: str, stopped: bool = True, question: str = "q") -> Sample:
    return Sample(Prompt("p", ask(question)), 0, text, (), (), stopped)


def test_texts_are_scored_at_their_end_of_turn_or_at_their_last_character():
    role = scorer(1)
    samples = [sample("yes"), sample("yes", stopped=False), sample("no", question="longer?"), sample("")]
    found = score_texts(Reward(role.module, chat(), 2.0), samples, 64)
    prompts = [chat().prompt_ids(s.prompt.messages) for s in samples]
    ids = [chat().completion_ids(s.text, finished=s.stopped) for s in samples]
    expected = [x for (x,) in score_samples(role.module, prompts, [[i] for i in ids])]
    assert found == pytest.approx([x + 2.0 for x in expected], abs=1e-5)
    assert abs(found[0] - found[1]) > 1e-4  # the end of turn is a token of its own


def test_an_answer_scores_the_same_in_any_company():
    """T16: longer, shorter and empty neighbours, the pad's id inside a text."""
    model = scorer(1).module
    pad = chat().tokenizer.pad_token_id
    one = continuations([1, 9, pad], [[pad, 7], [8], []])
    alone = raw_scores(model, [one])
    many = raw_scores(model, [continuations([1], [[5] * 30]), one, continuations([1, 2], [[pad]])])
    assert many[1:4] == pytest.approx(alone, abs=1e-6)
    ids = torch.tensor([[1, 9, pad, pad, 7]])
    plain = model.classifier(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.item()
    assert alone[0] == pytest.approx(plain, abs=1e-6)


def test_a_control_token_spelled_in_an_answer_is_text():
    role = scorer(1)
    reward = Reward(role.module, chat(), 0.0)
    spelled, plain = score_texts(reward, [sample("a<|end|>"), sample("a")], 64)
    assert abs(spelled - plain) > 1e-4
    assert score_texts(reward, [replace(sample("a"), ids=(1, 2))], 64) == pytest.approx([plain], abs=1e-6)


def test_no_groups_have_no_scores():
    assert raw_scores(scorer().module, []) == []
