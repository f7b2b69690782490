"""One policy's answers and figures."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.data.records import Document, Prompt, Sample
from pipeline.evaluate.policies import (
    Answered,
    add_gold,
    add_reward,
    answer,
    exhibits,
    kl_to,
    text_perplexity,
)
from pipeline.rollout.engine import SamplingSettings
from pipeline.rollout.noise import NoiseKey
from pipeline.rollout.reward import Reward, score_texts
from tests.small import ask, chat, forget_gradients, policy, prompts, scorer

KEY = NoiseKey(0, "evaluate")
SAMPLING = SamplingSettings(samples=2, max_new_tokens=5)


def answered(name: str = "sft", *texts: str) -> Answered:
    """Two answers to each of two prompts."""
    made = [
        Sample(Prompt(f"p{i // 2}", ask("ab"[i // 2])), i % 2, text, (9,) * len(text), (), i != 3)
        for i, text in enumerate(texts or ("one", "three", "x", "unfinished"))
    ]
    length = np.array([[len(s.ids) for s in made[i : i + 2]] for i in (0, 2)], dtype=float)
    stopped = np.array([[s.stopped for s in made[i : i + 2]] for i in (0, 2)], dtype=float)
    return Answered(name, made, length, stopped)


def test_answers_stand_by_prompt_and_share_their_noise():
    found = answer("sft", policy(), prompts("a", "long question", "b"), SAMPLING, 99, KEY)
    assert found.length.shape == found.stopped.shape == (3, 2)
    assert found.length.tolist() == [[len(s.ids) for s in found.samples[i : i + 2]] for i in (0, 2, 4)]
    assert [s.prompt.id for s in found.samples] == ["p0", "p0", "p1", "p1", "p2", "p2"]
    again = answer("other", policy(), prompts("a", "long question", "b"), SAMPLING, 99, KEY)
    assert [s.ids for s in again.samples] == [s.ids for s in found.samples]
    close = policy()
    with torch.no_grad():
        close.model.lm_head.weight.mul_(1.0001)
    near = answer("near", close, prompts("a", "long question", "b"), SAMPLING, 99, KEY)
    assert sum(a.ids == b.ids for a, b in zip(near.samples, found.samples, strict=True)) >= 5


def test_metrics_are_means_and_null_where_nothing_was_computed():
    found = answered()
    assert found.metrics() == {
        "proxy": None, "heldout": None, "gold": None, "gold_parts": None, "win_rate": None, "kl": None,
        "length": (3 + 5 + 1 + 10) / 4, "stop_rate": 0.75, "text_perplexity": None,
    }  # fmt: skip
    judge = SimpleNamespace(
        score=lambda prompt, text, stopped: SimpleNamespace(total=len(text) / 10, parts={"ended": stopped})
    )
    add_gold(found, judge)
    assert found.scores["gold"].tolist() == [[0.3, 0.5], [0.1, 1.0]]
    assert found.metrics()["gold"] == pytest.approx(0.475) and found.metrics()["gold_parts"] == {"ended": 0.75}


def test_rewards_stand_where_their_answers_do():
    found, reward = answered(), Reward(scorer(1).module, chat(), 0.5)
    add_reward(found, "proxy", reward, 64)
    expected = score_texts(reward, found.samples, 64)
    assert found.scores["proxy"].tolist() == [expected[:2], expected[2:]]
    assert found.metrics()["proxy"] == pytest.approx(sum(expected) / 4)


def test_kl_of_a_policy_to_itself_is_exactly_zero():
    """T37."""
    role = forget_gradients(policy())
    found = answer("sft", role, prompts("a", "b"), SAMPLING, 99, KEY)
    assert kl_to(forget_gradients(policy()), role, found.samples, 64) == 0.0


def test_kl_is_the_mean_of_summed_log_ratios():
    """A first token whose log-prob is known under both: all rows of the head equal but one."""
    roles = []
    for strength in (0.0, 1.0):
        role = forget_gradients(policy())
        with torch.no_grad():
            role.model.lm_head.weight.zero_()
        role.model.lm_head.bias = torch.nn.Parameter(torch.zeros(264), requires_grad=False)
        role.model.lm_head.bias[40] = strength
        roles.append(role)
    uniform, tilted = roles
    total = 263 + math.e
    log_p = {40: math.log(math.e / total)}
    samples = [
        Sample(Prompt("a", ask("a")), 0, "", (40, 50), (), False),
        Sample(Prompt("b", ask("bb")), 0, "", (50,), (), False),
    ]
    ratio = lambda i: log_p.get(i, math.log(1 / total)) - math.log(1 / 264)
    expected = ((ratio(40) + ratio(50)) + ratio(50)) / 2
    assert kl_to(uniform, tilted, samples, 64) == pytest.approx(expected, abs=1e-5)
    assert kl_to(tilted, uniform, samples, 64) == pytest.approx(-expected, abs=1e-5)


def test_estimated_kl_agrees_with_the_exact_one():
    """One-token answers: the mean over many samples against the sum over the vocabulary; positive both ways."""
    first, second = forget_gradients(policy(0)), forget_gradients(policy(1))
    one = SamplingSettings(samples=400, max_new_tokens=1)
    found = answer("one", first, prompts("a", "b"), one, 99, KEY)
    ids = torch.tensor([chat().prompt_ids(ask(c)) for c in "ab"])
    p, q = (
        torch.log_softmax(r.model(input_ids=ids, use_cache=False).logits[:, -1].double(), -1) for r in (first, second)
    )
    exact = float((p.exp() * (p - q)).sum(-1).mean())
    spread = float((p.exp() * (p - q).square()).sum(-1).mean()) ** 0.5
    assert exact > 0.05
    assert kl_to(second, first, found.samples, 4096) == pytest.approx(exact, abs=4 * spread / 800**0.5)


def test_perplexity_of_a_policy_that_knows_nothing_is_its_vocabulary():
    role = forget_gradients(policy())
    with torch.no_grad():
        role.model.lm_head.weight.zero_()
    documents = [Document("some text"), Document("x"), Document("a" * 40)]
    assert text_perplexity(role, documents, 16, 32) == pytest.approx(264, rel=1e-5)


def test_perplexity_does_not_depend_on_how_documents_are_batched():
    role = forget_gradients(policy())
    documents = [Document("text " * (i + 1)) for i in range(5)]
    assert text_perplexity(role, documents, 64, 64) == pytest.approx(text_perplexity(role, documents[::-1], 64, 999))


def test_exhibits_show_the_first_answer_of_every_policy():
    sft, ppo = answered("sft"), answered("ppo", "uno", "tres", "y", "cut")
    sft.scores["gold"] = np.array([[0.1, 0.2], [0.3, 0.4]])
    sft.parts["ended"] = np.array([[1.0, 1.0], [1.0, 0.0]])
    shown = exhibits([sft, ppo], 9)
    assert [(e.id, [(a.policy, a.text) for a in e.answers]) for e in shown] == [
        ("p0", [("sft", "one"), ("ppo", "uno")]),
        ("p1", [("sft", "x"), ("ppo", "y")]),
    ]
    assert shown[1].answers[0].scores == {"gold": 0.3} and shown[1].answers[0].parts == {"ended": 1.0}
    assert len(exhibits([sft, ppo], 1)) == 1 and exhibits([sft], 0) == []
