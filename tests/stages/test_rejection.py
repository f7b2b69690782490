"""The rejection row in this process: fresh answers, a store read again, a judge beside, nothing trained."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.data.records import Prompt
from pipeline.data.world import as_json
from pipeline.data.world_truth import Frame, Key
from pipeline.flow.errors import UserError
from pipeline.rollout.mining import drop_useless
from pipeline.rollout.native import NativeEngine
from pipeline.rollout.samples import read_samples
from tests.small import artifact, ask, comparison, policy, save
from tests.stages.rows import ANSWERS, QUESTIONS, Place, Row, train

SHORT = {"samples": 8, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("rejection"))


@pytest.fixture(scope="module")
def sft(place: Place) -> Any:
    """A policy that gives eight answers, with some variety."""
    turns = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        for q, a in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    demonstrations = place.data("conversations", [{"messages": t} for t in turns])
    base = save(place.root / "base", "policy", policy().model)
    return place.run("sft", {"policy": base, "conversations": demonstrations}, train=train(epochs=25)).out["policy"]


def reward_model(place: Place, sft: Any, liked: str) -> Any:
    pairs = [comparison(q, f"{a}{liked}", a) for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    inputs = {"policy": sft, "comparisons": place.data("comparisons", pairs)}
    return place.run("reward", inputs, train=train(epochs=2, learning_rate=3e-3)).out["model"]


@pytest.fixture(scope="module")
def reward(place: Place, sft: Any) -> Any:
    return reward_model(place, sft, "!")


@pytest.fixture(scope="module")
def other(place: Place, sft: Any) -> Any:
    return reward_model(place, sft, "e")


@pytest.fixture(scope="module")
def prompts(place: Place) -> Any:
    return place.data("prompts", [Prompt(f"p{i}", ask(q)) for i, q in enumerate(QUESTIONS)])


@pytest.fixture(scope="module")
def first(place: Place, sft: Any, reward: Any, prompts: Any) -> Row:
    return place.run("rejection", {"policy": sft, "reward": reward, "prompts": prompts}, sampling=SHORT, train=train())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts every call of an engine was given."""
    found: list[int] = []
    generate = NativeEngine.generate

    def counted(self: Any, prompts: Any, *arguments: Any, **named: Any) -> Any:
        found.append(len(prompts))
        return generate(self, prompts, *arguments, **named)

    monkeypatch.setattr(NativeEngine, "generate", counted)
    return found


def scores(row: Row, source: str) -> list[float]:
    return [s["scores"][source] for s in row.rows("samples")]


def test_every_sample_says_who_drew_it_and_what_it_cost(first: Row, sft: Any) -> None:
    samples = first.rows("samples")
    assert len(samples) == 64
    for s in samples:
        assert s["origin"] == {
            "policy": sft.digest, "tokenizer": sft.lineage["tokenizer"], "template": sft.lineage["template"],
            "row": "rejection", "seed": 0, "iteration": 0, "temperature": 1.0,
        }  # fmt: skip
        assert len(s["ids"]) == len(s["logprobs"]) == len(s["raw_logprobs"]) == s["cost"]["new"]
    lengths = {q: len(q) + 4 for q in QUESTIONS}  # a user turn of n characters is n + 4 tokens
    assert sum(s["cost"]["prompt"] for s in samples) == sum(lengths.values()) == first.metrics["prompt_tokens"]
    assert first.metrics["sampled_tokens"] == sum(len(s["ids"]) for s in samples)
    facts = first.out["samples"].lineage
    assert facts["policies"] == [sft.digest] and facts["tokenizer"] == sft.lineage["tokenizer"]
    assert "rendered_again" not in facts


def test_a_rerun_from_the_store_draws_nothing_and_trains_the_same_policy(
    place: Place, sft: Any, reward: Any, first: Row, calls: list[int]
) -> None:
    """The very samples, with the scores that are there or scored again: the same answers chosen, the same weights."""
    store = [first.out["samples"]]
    kept = place.run("rejection", {"policy": sft, "samples": store}, sampling=SHORT, train=train())
    again = place.run("rejection", {"policy": sft, "samples": store, "reward": reward}, sampling=SHORT, train=train())
    assert calls == []
    for row in (kept, again):
        for slot in ("conversations", "comparisons", "policy"):
            assert row.out[slot].digest == first.out[slot].digest
        assert row.metrics["drawn"] == row.metrics["sampled_tokens"] == row.metrics["prompt_tokens"] == 0
        assert row.metrics["tokens"] == row.metrics["trained_tokens"] > 0
    assert kept.out["samples"].digest == first.out["samples"].digest
    assert kept.out["samples"].lineage["scored_by"] == {"proxy": reward.digest}
    assert scores(again, "proxy") == pytest.approx(scores(first, "proxy"), abs=1e-6)


def test_another_reward_model_scores_the_store_under_a_name_of_its_own(
    place: Place, other: Any, reward: Any, first: Row, calls: list[int]
) -> None:
    inputs = {"reward": other, "samples": [first.out["samples"]]}
    row = place.run("rejection", inputs, score="second", train=None)
    assert calls == [] and set(row.out) == {"samples", "conversations", "comparisons"}
    assert scores(row, "proxy") == scores(first, "proxy") != scores(row, "second")
    assert row.out["samples"].lineage["scored_by"] == {"proxy": reward.digest, "second": other.digest}
    usable, _ = drop_useless(read_samples(row.out["samples"].path / "data.jsonl"), unfinished=True)
    best: dict[str, tuple[float, str]] = {}
    for s in usable:
        best[s.prompt.id] = max(best.get(s.prompt.id, (-1e9, "")), (s.scores["second"], s.text))
    chosen = [c["messages"][-1]["content"] for c in row.rows("conversations")]
    assert sorted(chosen) == sorted(text for _, text in best.values())
    assert {c["annotator"] for c in row.rows("comparisons")} == {"second"}


def test_a_row_that_trains_nothing_chooses_as_one_that_does(
    place: Place, sft: Any, reward: Any, prompts: Any, first: Row
) -> None:
    row = place.run("rejection", {"policy": sft, "reward": reward, "prompts": prompts}, sampling=SHORT, train=None)
    assert set(row.out) == {"samples", "conversations", "comparisons"} and "loss" not in row.metrics
    for slot in row.out:
        assert row.out[slot].digest == first.out[slot].digest
    assert row.metrics["tokens"] == row.metrics["sampled_tokens"]


def test_fresh_answers_stand_beside_those_of_the_store(
    place: Place, sft: Any, reward: Any, prompts: Any, first: Row, calls: list[int]
) -> None:
    """Another round draws other answers to the same prompts; the best is the best of both."""
    inputs = {"policy": sft, "reward": reward, "prompts": prompts, "samples": [first.out["samples"]]}
    row = place.run("rejection", inputs, sampling=SHORT, train=None, round=1)
    samples = row.rows("samples")
    assert calls == [8] and len(samples) == 128 and row.metrics["drawn"] == 64
    assert {s["origin"]["iteration"] for s in samples[:64]} == {0}
    assert {s["origin"]["iteration"] for s in samples[64:]} == {1}
    assert [s["ids"] for s in samples[:64]] != [s["ids"] for s in samples[64:]]
    assert all(r["kl_bound"] is None for r in row.metrics["best_of_n"]["rows"])  # of two rounds, not of one policy
    assert len(row.metrics["best_of_n"]["rows"]) == 16
    assert (
        row.metrics["best_of_n"]["rows"][-1]["reward"]["mean"]
        >= first.metrics["best_of_n"]["rows"][-1]["reward"]["mean"]
    )


def test_rounds_take_other_prompts(place: Place, sft: Any, reward: Any, prompts: Any) -> None:
    inputs = {"policy": sft, "reward": reward, "prompts": prompts}
    asked = [
        {
            s["prompt"]["id"]
            for s in place.run("rejection", inputs, sampling=SHORT, train=None, prompts=4, round=r).rows("samples")
        }
        for r in (0, 1)
    ]
    assert len(asked[0]) == len(asked[1]) == 4 and not asked[0] & asked[1]


def test_a_ladder_draws_at_every_temperature(
    place: Place, sft: Any, reward: Any, prompts: Any, calls: list[int]
) -> None:
    inputs = {"policy": sft, "reward": reward, "prompts": prompts}
    ladder = {"sampling": {"samples": 3, "max_new_tokens": 12}, "temperatures": [0.5, 1.0], "train": None}
    row = place.run("rejection", inputs, **ladder)
    samples = row.rows("samples")
    assert calls == [8, 8] and [s["index"] for s in samples[:6]] == list(range(6))
    assert [s["origin"]["temperature"] for s in samples[:6]] == [0.5] * 3 + [1.0] * 3


def test_dev_is_answered_by_draws_where_answers_are_searched_for(
    place: Place, sft: Any, reward: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log ratio of the likeliest answers is no estimate of the KL."""
    seen: list[tuple[int, float]] = []
    generate = NativeEngine.generate

    def noted(self: Any, asked: Any, settings: Any, *arguments: Any, **named: Any) -> Any:
        seen.append((settings.num_beams, settings.temperature))
        return generate(self, asked, settings, *arguments, **named)

    monkeypatch.setattr(NativeEngine, "generate", noted)
    beams = {"samples": 2, "num_beams": 2, "temperature": 0.0, "max_new_tokens": 12}
    inputs = {"policy": sft, "reward": reward, "prompts": prompts, "dev": prompts}
    row = place.run("rejection", inputs, sampling=beams, train=train(evaluations=1))
    assert seen == [(2, 0.0), (1, 1.0)] and "dev/kl" in row.log[-1]


def test_the_curve_is_of_all_samples_and_ends_at_the_mean_of_the_best(first: Row) -> None:
    """n = 1 is the mean of all 64 scores, n = 8 the mean of each prompt's highest; the bound is ln n - (n - 1) / n."""
    rows = first.metrics["best_of_n"]["rows"]
    assert [r["n"] for r in rows] == list(range(1, 9))
    groups: dict[str, list[float]] = {}
    for s in first.rows("samples"):
        groups.setdefault(s["prompt"]["id"], []).append(s["scores"]["proxy"])
    assert rows[0]["reward"]["mean"] == pytest.approx(first.metrics["score"])
    assert rows[7]["reward"]["mean"] == pytest.approx(sum(map(max, groups.values())) / 8)
    means = [r["reward"]["mean"] for r in rows]
    assert means == sorted(means) and means[0] < means[-1]
    assert [rows[i]["kl_bound"] for i in (0, 1, 3)] == pytest.approx([0.0, 0.1931471806, 0.6362943611])
    assert all(r["by_reward"] is r["by_gold"] is None for r in rows)


def judge_of(place: Place, name: str) -> Any:
    """A judge to whom a short answer that says "ten" is right, whatever was asked."""
    directory = place.root / name
    directory.mkdir()
    key = Key({"number": (("ten",),)}, (Frame((), "number"),), 3)
    lines = ({"prompt": as_json(ask(q)), "key": key.to_json()} for q in QUESTIONS)
    (directory / "judge.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return artifact(directory, "judge")


def test_a_judge_is_recorded_and_changes_nothing(place: Place, sft: Any, reward: Any, prompts: Any, first: Row) -> None:
    inputs = {"policy": sft, "reward": reward, "prompts": prompts, "judge": judge_of(place, "judge")}
    row = place.run("rejection", inputs, sampling=SHORT, train=train())
    for slot in row.out:
        assert row.out[slot].digest == first.out[slot].digest  # nothing chosen by it, nothing of it in the store
    rows = row.metrics["best_of_n"]["rows"]
    assert all(0 <= r["by_reward"]["mean"] <= r["by_gold"]["mean"] <= 1 for r in rows)
    assert rows[-1]["by_gold"]["mean"] > rows[0]["by_gold"]["mean"]


def test_a_policy_of_another_template_renders_texts_again(place: Place, sft: Any, first: Row) -> None:
    """Both digests are recorded beside what was rendered."""
    foreign = place.root / "foreign"
    foreign.mkdir()
    text = (first.out["samples"].path / "data.jsonl").read_text()
    (foreign / "data.jsonl").write_text(text.replace(sft.lineage["template"], "another"))
    store = artifact(foreign, "samples")
    row = place.run("rejection", {"policy": sft, "samples": [store]}, train=train())
    assert row.out["policy"].digest == first.out["policy"].digest  # the texts are the same
    assert row.out["conversations"].lineage["rendered_again"] == {
        "samples": 64,
        "drawn_with": [{"tokenizer": sft.lineage["tokenizer"], "template": "another"}],
        "rendered_with": {"tokenizer": sft.lineage["tokenizer"], "template": sft.lineage["template"]},
    }
    assert any("64 of 64 samples were drawn with another tokenizer or template than the policy" in s for s in row.said)


def test_a_store_without_scores_of_that_name_is_refused(place: Place, first: Row) -> None:
    with pytest.raises(UserError, match=r"no score 'gold' \(it has: proxy\)"):
        place.run("rejection", {"samples": [first.out["samples"]]}, score="gold", train=None)


def test_nothing_to_learn_from_is_refused_only_where_something_is_learnt(place: Place, sft: Any, first: Row) -> None:
    store = {"samples": [first.out["samples"]]}
    with pytest.raises(UserError, match=r"none of 64 answers can be learnt from .*lower choose.threshold"):
        place.run("rejection", {**store, "policy": sft}, choose={"threshold": 1e6}, train=train())
    assert place.run("rejection", store, choose={"threshold": 1e6}, train=None).metrics["chosen"] == 0
