"""Prompts to scored samples: which prompts, in which order, with whose scores."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.data.forest import build
from pipeline.data.groups import answers
from pipeline.data.records import Prompt, Sample
from pipeline.flow.errors import UserError
from pipeline.rollout.collect import EncodedPrompts, Sampler, encode_prompts, figures, fitting
from pipeline.rollout.engine import SamplingSettings
from pipeline.rollout.mining import best_of
from pipeline.rollout.noise import NoiseKey
from pipeline.rollout.reward import Reward
from pipeline.rollout.scoring import score_samples
from tests.small import ask, chat, policy, prompts, scorer

KEY = NoiseKey(0, "test")
SETTINGS = SamplingSettings(samples=3, max_new_tokens=4)


def test_prompts_without_room_for_an_answer_are_counted():
    encoded = encode_prompts(prompts("abc", "a" * 20, "b"), chat(), max_tokens=15, max_new_tokens=8)  # 3 + 4 fit in 7
    assert [p.id for p in encoded.prompts] == ["p0", "p2"] and encoded.dropped == 1 and len(encoded) == 2
    assert encoded.ids == [chat().prompt_ids(ask("abc")), chat().prompt_ids(ask("b"))]
    taken = encoded.take([1, 0])
    assert [p.id for p in taken.prompts] == ["p2", "p0"] and taken.ids == encoded.ids[::-1] and taken.dropped == 1
    with pytest.raises(UserError, match=r"no prompt has at most 7 tokens \(max_tokens 15 less"):
        encode_prompts(prompts("a" * 20), chat(), 15, 8)


def test_all_policies_answer_the_prompts_that_fit_under_every_tokenizer():
    class Twice:
        def prompts_ids(self, conversations: list[Any]) -> list[list[int]]:
            return [ids * 2 for ids in chat().prompts_ids(conversations)]

    twice: Any = Twice()
    asked = prompts("a", "abcd", "a" * 20)  # 5, 8 and 24 tokens, where 14 fit, and twice as many
    assert [p.id for p in fitting(asked, [chat()], 15, 1)] == ["p0", "p1"]
    assert [p.id for p in fitting(asked, [twice, chat()], 15, 1)] == ["p0"]
    with pytest.raises(UserError, match="no prompt has at most 9 tokens"):
        fitting(asked, [chat(), twice], 15, 6)


def encoded(*texts: str) -> EncodedPrompts:
    return encode_prompts(prompts(*texts), chat(), 99, 9)


def test_every_sample_stands_at_its_prompt_with_its_own_score():
    """T48: K of each prompt, in prompt order; scores are those of that very text behind that very prompt."""
    role, judge = policy(), scorer(1).module
    reward = Reward(judge, chat(), shift=0.5)
    asked = encoded("a", "long question", "b")
    rollout = Sampler(role.model, chat(), SETTINGS, KEY, reward=reward).sample(asked)
    assert [(s.prompt.id, s.index) for s in rollout.samples] == [(f"p{i}", k) for i in range(3) for k in range(3)]
    for i, ids in enumerate(asked.ids):
        for sample in rollout.samples[3 * i : 3 * i + 3]:
            ((alone,),) = score_samples(judge, [ids], [[sample.ids]])
            assert sample.scores["proxy"] == pytest.approx(alone + 0.5, abs=1e-5)
            assert sample.text == chat().decode(sample.ids) and len(sample.logprobs) == len(sample.ids)
            assert sample.stopped == (sample.ids[-1] in chat().stop_ids)
    groups = rollout.groups([float(i) for i in range(9)])
    forest = build(groups)
    assert forest.facts["score"][answers(forest)].tolist() == list(range(9))
    assert [list(g[0].ids) for g in groups] == asked.ids
    assert [tuple(s.ids) for g in groups for s in g[1:]] == [s.ids for s in rollout.samples]


def test_permuting_prompts_permutes_samples_and_their_best():
    """T48: noise goes by the prompt's id, so that nothing depends on where a prompt stands."""
    sampler = Sampler(policy().model, chat(), SETTINGS, KEY, reward=Reward(scorer(1).module, chat(), 0.0))
    asked = encoded("a", "bb", "ccc", "dddd")
    order = [2, 0, 3, 1]
    first, second = sampler.sample(asked), sampler.sample(asked.take(order))
    by_place = [first.samples[3 * i + k] for i in order for k in range(3)]
    assert [(s.prompt.id, s.ids) for s in second.samples] == [(s.prompt.id, s.ids) for s in by_place]
    best = [{s.prompt.id: s.index for s in best_of(r.samples, "proxy")} for r in (first, second)]
    assert best[0] == best[1]


def test_iterations_and_seeds_draw_anew():
    def ids(key: NoiseKey, iteration: int) -> list[tuple[int, ...]]:
        rollout = Sampler(policy().model, chat(), SETTINGS, key).sample(encoded("a"), iteration=iteration)
        return [s.ids for s in rollout.samples]

    assert ids(KEY, 0) == ids(KEY, 0)
    assert len({tuple(ids(KEY, 0)), tuple(ids(KEY, 1)), tuple(ids(NoiseKey(1, "test"), 0))}) == 3


class Rank:
    """One of two ranks; `everyone` collects what both gathered."""

    def __init__(self, rank: int, everyone: list[Any]) -> None:
        self.rank, self.everyone = rank, everyone

    def share(self, sizes: list[int]) -> list[int]:
        return [i for i in range(len(sizes)) if i % 2 == self.rank]

    def gather(self, value: Any) -> list[Any]:
        self.everyone[self.rank] = value
        return [v for v in self.everyone if v is not None]


def test_ranks_share_the_work_and_all_get_everything():
    sampler = Sampler(policy().model, chat(), SETTINGS, KEY, reward=Reward(scorer(1).module, chat(), 0.0))
    asked = encoded("a", "bb", "ccc")
    everyone: list[Any] = [None, None]
    with pytest.raises(KeyError):  # the first rank alone does not have the second's samples
        sampler.sample(asked, ranks=Rank(0, everyone))
    shared, alone = sampler.sample(asked, ranks=Rank(1, everyone)), sampler.sample(asked)
    assert [s.ids for s in shared.samples] == [s.ids for s in alone.samples]
    assert [s.scores["proxy"] for s in shared.samples] == pytest.approx([s.scores["proxy"] for s in alone.samples])


def sample(score: float | None, tokens: int, stopped: bool) -> Sample:
    scores = {} if score is None else {"proxy": score}
    return Sample(Prompt("p", ask("q")), 0, "x", (9,) * tokens, (0.0,) * tokens, stopped, scores)


def test_figures_by_hand():
    found = figures([sample(1.0, 2, True), sample(3.0, 4, True), sample(2.0, 6, False), sample(2.0, 8, True)])
    assert found == {
        "length": 5.0, "stop_rate": 0.75, "sampled_tokens": 20, "samples": 4, "score": 2.0, "score_std": 0.5**0.5,
    }  # fmt: skip
    assert "score" not in figures([sample(None, 2, True)])


@pytest.mark.parametrize("tokens", [1, 3])
def test_nothing_follows_the_end(tokens: int):
    """T41: no token after the stop token is sampled, scored or trained."""
    settings = SamplingSettings(samples=64, max_new_tokens=tokens)
    rollout = Sampler(policy(spread=0.02).model, chat(), settings, NoiseKey(3, "test")).sample(encoded("a", "b"))
    stops = [i in chat().stop_ids for s in rollout.samples for i in s.ids[:-1]]
    assert not any(stops) and all(len(s.ids) == tokens for s in rollout.samples if not s.stopped)
