"""The store: what is written, what a continued row keeps, and scoring without generating."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.reader import Reader
from pipeline.data.records import Cost, Message, Origin, Prompt, Sample
from pipeline.flow.errors import Damaged, UserError
from pipeline.rollout.collect import Sampler, encode_prompts
from pipeline.rollout.engine import SamplingSettings
from pipeline.rollout.native import NativeEngine
from pipeline.rollout.noise import NoiseKey
from pipeline.rollout.reward import Reward, score_texts
from pipeline.rollout.samples import (
    SampleLog,
    describe_samples,
    note_rendering,
    origin_of,
    read_samples,
    read_stores,
    recorded,
    score_again,
    shared_scores,
    summary,
    with_scores,
    write_samples,
)
from tests.small import Listener, artifact, ask, chat, policy, prompts, save, scorer

DRAWN = Origin("p" * 8, "tok", "tem", row="ppo", seed=7, iteration=0, temperature=0.7)
OURS = {"tokenizer": "tok", "template": "tem"}


def sample(prompt: str, index: int, text: str, iteration: int = 0) -> Sample:
    asked = Prompt(prompt, (Message("user", f"Say {prompt}."),), "here")
    origin = replace(DRAWN, iteration=iteration)
    return Sample(asked, index, text, (61, 12), (-0.5, -0.25), True, {"proxy": 1.0}, (-0.75, -0.5), origin, Cost(9, 2))


SAMPLES = [sample("a", 0, "one"), sample("b", 0, "two"), sample("a", 1, "three")]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    assert write_samples(path, SAMPLES) == 3
    assert read_samples(path) == SAMPLES
    row = json.loads(path.read_text().splitlines()[0])
    assert row["origin"] == {
        "policy": "p" * 8, "tokenizer": "tok", "template": "tem", "row": "ppo", "seed": 7, "iteration": 0,
        "temperature": 0.7,
    }  # fmt: skip
    assert row["cost"] == {"prompt": 9, "new": 2} and row["raw_logprobs"] == [-0.75, -0.5]


def test_whatever_was_drawn_can_be_read_again(tmp_path: Path) -> None:
    """A policy may draw a NUL, half a character, or the signs that end a line elsewhere."""
    odd = [replace(sample("a", i, t), index=i) for i, t in enumerate(["a\0b", "\ufffd", "\u2028", "\x85\r", '"\\'])]
    kept = recorded(odd, [[1, 2]], DRAWN)
    write_samples(tmp_path / "data.jsonl", kept)
    assert read_samples(tmp_path / "data.jsonl") == kept
    assert [s.text for s in kept] == ["a\u2400b", *(s.text for s in odd[1:])]


def test_an_answer_as_a_text_alone_is_a_sample_too(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    row = {"prompt": {"id": "a", "messages": [{"role": "user", "content": "q"}]}, "index": 0, "text": "x"}
    path.write_text(json.dumps({**row, "stopped": True}) + "\n")
    (found,) = read_samples(path)
    assert (found.ids, found.logprobs, found.raw_logprobs, found.origin, found.cost) == ((), (), (), None, None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"logprobs": [-0.5]}, "2 ids, 1 logprobs"),
        ({"raw_logprobs": [-0.5]}, "2 ids, 1 raw_logprobs"),
        ({"ids": [1, "2"]}, "ids holds a string"),
        ({"ids": [1, None]}, "ids holds null"),
        ({"ids": [1.5, 2]}, "ids holds a number"),
        ({"scores": {"proxy": "good"}}, "scores.proxy is a string"),
        ({"scores": {"proxy": True}}, "scores.proxy is a boolean"),
        ({"origin": {"machine": "here"}}, "origin has the keys machine"),
        ({"cost": {"new": 1.5}}, "cost.new is a number"),
        ({"stopped": 1}, "stopped is a number"),
    ],
)
def test_a_bad_line_is_named_with_its_reason(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = tmp_path / "data.jsonl"
    write_samples(path, SAMPLES)
    lines = path.read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), **changes})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=rf"data\.jsonl:2: .*{reason}"):
        read_samples(path)


def test_a_torn_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    write_samples(path, SAMPLES)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:40]]) + "\n")
    with pytest.raises(UserError, match=r"data\.jsonl:2"):
        read_samples(path)


def test_what_stands_in_two_stores_counts_once_with_the_scores_of_both(tmp_path: Path) -> None:
    """Round 2 holds round 1's samples scored again; answers of unknown origin are never taken for one another."""
    unknown = [replace(SAMPLES[0], origin=None)] * 2
    stores = []
    later = [*with_scores(SAMPLES, "second", [5.0, 6.0, 7.0]), sample("a", 0, "new", 1)]
    for name, samples in (("one", [*SAMPLES, *unknown]), ("two", later)):
        (tmp_path / name).mkdir()
        write_samples(tmp_path / name / "data.jsonl", samples)
        stores.append(artifact(tmp_path / name, "samples"))
    reader = Reader(Listener())
    found = read_stores(reader, stores)
    assert found == [*with_scores(SAMPLES, "second", [5.0, 6.0, 7.0]), *unknown, sample("a", 0, "new", 1)]
    assert [reader.counts[slot]["records"] for slot in ("samples-1", "samples-2")] == [5, 4]
    assert read_stores(reader, stores[:1]) == [*SAMPLES, *unknown]


# --- a store that grows ---


def iteration(number: int) -> list[Sample]:
    return [sample("a", k, f"{number} {k} ü", number) for k in range(3)]


def test_a_row_that_continues_has_the_file_of_one_that_was_never_stopped(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    log = SampleLog(whole)
    for i in range(4):
        log.append(iteration(i))
    cut.write_bytes(whole.read_bytes())
    with cut.open("ab") as stream:
        stream.write(b'{"prompt": {"id": "a", "mess')  # torn off
    log = SampleLog(cut, start=2)  # two iterations are done: what the third had left goes
    assert read_samples(cut) == [*iteration(0), *iteration(1)]
    for i in (2, 3):
        log.append(iteration(i))
    assert cut.read_bytes() == whole.read_bytes()


def test_a_row_that_starts_anew_leaves_nothing_of_an_earlier_try(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    SampleLog(path).append(iteration(0))
    SampleLog(path).append(iteration(1))
    assert read_samples(path) == iteration(1)


def test_missing_iterations_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with pytest.raises(Damaged, match="ends in iteration -1, but the row continues after iteration 0"):
        SampleLog(path, start=1)
    SampleLog(path).append(iteration(0))
    with pytest.raises(Damaged, match="ends in iteration 0, but the row continues after iteration 2"):
        SampleLog(path, start=3)


def test_only_the_main_rank_writes(tmp_path: Path) -> None:
    log = SampleLog(tmp_path / "data.jsonl", main=False)
    log.append(SAMPLES)
    assert not (tmp_path / "data.jsonl").exists()


# --- origin and cost ---


def drawn(k: int = 3) -> tuple[Any, list[Sample], Any, NativeEngine]:
    role = policy()
    asked = encode_prompts(prompts("a", "bb", "ccc"), chat(), 99, 9)
    sampler = Sampler(role.model, chat(), SamplingSettings(samples=k, max_new_tokens=6), NoiseKey(0, "test"))
    rollout = sampler.sample(asked)
    return role, recorded(rollout.samples, rollout.prompt_ids, DRAWN), asked, sampler.engine


def test_the_cost_of_all_is_what_the_engine_computed() -> None:
    """A user turn of n characters is n + 4 tokens of prompt, computed once for three samples."""
    _, samples, _, engine = drawn()
    assert [s.cost.prompt for s in samples if s.cost] == [5, 0, 0, 6, 0, 0, 7, 0, 0]
    costs = [s.cost for s in samples if s.cost]
    assert sum(c.prompt for c in costs) == engine.usage.prompt_tokens == 18
    assert sum(c.new for c in costs) == engine.usage.new_tokens == sum(len(s.ids) for s in samples)


def test_log_probs_are_kept_under_both_distributions() -> None:
    """At temperature 0.5 over logits z: the sampler's log-prob of a token is not the policy's own."""
    role = policy()
    asked = encode_prompts(prompts("a"), chat(), 99, 9)
    settings = SamplingSettings(samples=4, max_new_tokens=6, temperature=0.5)
    engine = NativeEngine(role.model, chat().stop_ids, chat().tokenizer.pad_token_id)
    (generated,) = engine.generate(asked.ids, settings, NoiseKey(0, "test"), names=["p0"])
    found = Sampler(role.model, chat(), settings, NoiseKey(0, "test")).sample(asked).samples
    assert [(s.ids, s.logprobs, s.raw_logprobs) for s in found] == [
        (g.ids, g.logprobs, g.raw_logprobs) for g in generated
    ]
    assert found[0].logprobs != found[0].raw_logprobs


def test_what_a_store_says_of_itself(tmp_path: Path) -> None:
    class Place(Listener):
        def __init__(self) -> None:
            super().__init__()
            self.facts: dict[str, Any] = {}

        def lineage(self, slot: str, **facts: Any) -> None:
            self.facts.update(facts)

    made = save(tmp_path / "policy", "policy", policy().model)
    origin = origin_of(made, "ppo", 3, iteration=2, temperature=1.0)
    assert origin == Origin(made.digest, made.lineage["tokenizer"], made.lineage["template"], "ppo", 3, 2, 1.0)
    place = Place()
    describe_samples(place, "samples", [origin, replace(origin, iteration=4)], {"proxy": "r" * 8})
    assert place.facts == {
        "policies": [made.digest], "scored_by": {"proxy": "r" * 8},
        "tokenizer": origin.tokenizer, "template": origin.template,
    }  # fmt: skip
    place = Place()
    describe_samples(place, "samples", [origin, replace(origin, tokenizer="other", policy="q")])
    assert place.facts == {
        "policies": sorted([made.digest, "q"]), "scored_by": {}, "template": origin.template,
    }  # fmt: skip
    place = Place()
    note_rendering(place, "samples", SAMPLES, OURS, "the policy")
    assert not place.facts and not place.said
    note_rendering(place, "samples", SAMPLES, {**OURS, "template": "new"}, "the policy")
    assert place.facts["rendered_again"] == {
        "samples": 3, "drawn_with": [OURS], "rendered_with": {"tokenizer": "tok", "template": "new"},
    }  # fmt: skip
    assert "3 of 3 samples were drawn with another tokenizer or template than the policy has" in place.said[0]


# --- scoring ---


def test_scores_by_source_stand_side_by_side() -> None:
    rescored = with_scores(SAMPLES[:2], "heldout", [0.1, 0.2])
    assert rescored[1].scores == {"proxy": 1.0, "heldout": 0.2}
    assert SAMPLES[1].scores == {"proxy": 1.0}


def test_scoring_again_gives_the_scores_of_sampling_and_generates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The very ids are scored where tokenizer and template agree, so a stored sample scores as when it was drawn."""
    role, samples, asked, _ = drawn()
    reward = Reward(scorer(1).module, chat(), 0.5)
    settings = SamplingSettings(samples=3, max_new_tokens=6)
    when_drawn = Sampler(role.model, chat(), settings, NoiseKey(0, "test"), reward=reward).sample(asked).samples
    monkeypatch.setattr(NativeEngine, "generate", lambda *a, **k: pytest.fail("generated"))
    found = score_again(samples, "again", reward, OURS, token_budget=64)
    assert [s.scores["again"] for s in found] == pytest.approx([s.scores["proxy"] for s in when_drawn], abs=1e-5)
    assert [replace(s, scores={}) for s in found] == samples


def test_texts_are_rendered_again_for_another_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids that mean something else are not looked at: samples of one text and other ids score alike."""
    reward = Reward(scorer(1).module, chat(), 0.0)
    one = Sample(Prompt("a", ask("a")), 0, "yes", (1, 2, 3), (0.0,) * 3, True, origin=DRAWN)
    other = replace(one, index=1, ids=(200, 201))
    foreign = {**OURS, "tokenizer": "another"}
    again = score_again([one, other], "proxy", reward, foreign, token_budget=64)
    expected = score_texts(reward, [one], 64)[0]
    assert [s.scores["proxy"] for s in again] == pytest.approx([expected] * 2, abs=1e-6)
    exact = score_again([one, other], "proxy", reward, OURS, token_budget=64)
    assert abs(exact[0].scores["proxy"] - exact[1].scores["proxy"]) > 1e-4
    mixed = score_again([one, replace(other, origin=None)], "proxy", reward, OURS, token_budget=64)
    assert [s.scores["proxy"] for s in mixed] == pytest.approx([exact[0].scores["proxy"], expected], abs=1e-6)


def test_permuting_prompts_permutes_scores() -> None:
    """T48: samples of several prompts in any order keep their own scores."""
    _, samples, _, _ = drawn()
    reward = Reward(scorer(1).module, chat(), 0.0)
    order = [4, 8, 0, 2, 6, 1, 7, 3, 5]
    straight = score_again(samples, "proxy", reward, OURS, token_budget=64)
    shuffled = score_again([samples[i] for i in order], "proxy", reward, OURS, token_budget=64)
    expected = [straight[i].scores["proxy"] for i in order]
    assert [s.scores["proxy"] for s in shuffled] == pytest.approx(expected, abs=1e-6)
    assert len({round(s.scores["proxy"], 6) for s in straight}) > 5


class Rank:
    """One of two ranks; `everyone` collects what both gathered."""

    def __init__(self, rank: int, everyone: list[Any]) -> None:
        self.rank, self.everyone = rank, everyone

    def share(self, sizes: list[int]) -> list[int]:
        return [i for i in range(len(sizes)) if i % 2 == self.rank]

    def gather(self, value: Any) -> list[Any]:
        self.everyone[self.rank] = value
        return [v for v in self.everyone if v is not None]


def test_ranks_share_the_scoring_and_all_get_everything() -> None:
    _, samples, _, _ = drawn()
    reward = Reward(scorer(1).module, chat(), 0.0)
    everyone: list[Any] = [None, None]
    with pytest.raises(KeyError):  # the first rank alone does not have the second's scores
        score_again(samples, "proxy", reward, OURS, token_budget=64, ranks=Rank(0, everyone))
    shared = score_again(samples, "proxy", reward, OURS, token_budget=64, ranks=Rank(1, everyone))
    alone = score_again(samples, "proxy", reward, OURS, token_budget=64)
    assert [s.scores["proxy"] for s in shared] == pytest.approx([s.scores["proxy"] for s in alone], abs=1e-6)


def test_a_function_is_asked_once_for_each_sample_whatever_ranks_there_are() -> None:
    """One that says something else every time, as a judge that is asked may, must say one thing to all ranks."""
    asked: list[str] = []

    def count(samples: Any) -> list[float]:
        asked.extend(s.text for s in samples)
        return [float(len(asked) - len(samples) + i) for i in range(len(samples))]

    everyone: list[Any] = [None, None]
    with pytest.raises(KeyError):
        shared_scores(SAMPLES, count, Rank(0, everyone))
    assert shared_scores(SAMPLES, count, Rank(1, everyone)) == [0.0, 2.0, 1.0]  # the first rank has samples 0 and 2
    assert asked == ["one", "three", "two"]
    assert shared_scores(SAMPLES, count) == [3.0, 4.0, 5.0]


def test_the_summary_by_hand() -> None:
    """Scores 1, 3 and 2: mean 2, deviation sqrt(2/3). Of the tokens only those of the one sample drawn here count."""
    samples = with_scores(SAMPLES, "heldout", [1.0, 3.0, 2.0])
    found = summary(samples, samples[2:], "heldout")
    assert found["score"] == 2.0 and found["score_std"] == pytest.approx((2 / 3) ** 0.5)
    assert (found["samples"], found["drawn"], found["prompts"]) == (3, 1, 2)
    assert (found["prompt_tokens"], found["sampled_tokens"]) == (9, 2)
    assert summary(samples, [], "heldout")["sampled_tokens"] == 0
