from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.data import world_text as text
from pipeline.data.records import Comparison, Document, Message
from pipeline.data.sources import read_comparisons, read_conversations, read_documents, read_prompts, to_json
from pipeline.data.world import Sizes, World, build_world
from pipeline.data.world_crowd import CROWD, PERFECT, Labellers, Style, write
from pipeline.data.world_facts import ASTRAY, ATTRIBUTES, MIX, Facts
from pipeline.data.world_stage import WorldStage
from pipeline.data.world_truth import is_correct, judge_text, named
from pipeline.flow.stage import Request, run_stage

SMALL = Sizes(
    documents=1500, heldout_documents=20, conversations=200, comparisons=300, heldout_pairs=200, prompts=150, dev=60,
    heldout=120,
)  # fmt: skip
TRAINING = ("documents", "conversations", "perfect_conversations", "comparisons", "prompts")


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(0, SMALL)


def digest(world: World) -> str:
    rows = [to_json(r) for name in (*TRAINING, "heldout_pairs", "dev", "heldout") for r in getattr(world, name)]
    rows += [key.to_json() for _, key in world.judge]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def messages_of(record: object) -> tuple[Message, ...]:
    return getattr(record, "messages", None) or getattr(record, "prompt", ())


def texts_of(records: list) -> list[str]:
    found = []
    for record in records:
        found += [str(m.content) for m in messages_of(record)]
        found += [record.text] if isinstance(record, Document) and record.text else []
        found += [c.text for c in record.completions] if isinstance(record, Comparison) else []
    return found


def unsourced(record: object) -> dict:
    return {key: value for key, value in to_json(record).items() if key != "source"}


def test_the_default_sizes_are_large_enough_to_report_from() -> None:
    assert Sizes().heldout >= 500 and Sizes().dev >= 300


def test_a_seed_gives_the_same_world_in_every_process(world: World) -> None:
    program = (
        "import sys; sys.path[:0] = ['.', 'tests/data']\n"
        "import test_world as t; print(t.digest(t.build_world(0, t.SMALL)))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True,
        env={"PYTHONHASHSEED": "77", "PATH": ""},
    )  # fmt: skip
    assert done.stdout.strip() == digest(world)
    assert digest(build_world(1, replace(SMALL, documents=20))) != digest(build_world(0, replace(SMALL, documents=20)))


def test_no_two_splits_share_a_prompt(world: World) -> None:
    splits = {
        "train": {messages_of(r) for name in ("comparisons", "prompts") for r in getattr(world, name)}
        | {messages_of(r)[:1] for r in world.conversations}
        | {r.messages[:1] for r in world.documents if r.messages},
        **{name: {messages_of(r) for r in getattr(world, name)} for name in ("dev", "heldout", "heldout_pairs")},
    }
    names = list(splits)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not splits[one] & splits[other], (one, other)
    assert len(splits["heldout"]) == SMALL.heldout and len(splits["dev"]) == SMALL.dev


def test_wordings_kept_for_development_and_test_stand_in_no_training_text(world: World) -> None:
    def pattern(core: str) -> re.Pattern[str]:
        first, rest = core[0], re.escape(core[1:])
        return re.compile(f"[{first}{first.upper()}]" + re.sub(r"\\\{\w\\\}", r"[\\w ,]+", rest))

    patterns = [pattern(cores[-1]) for cores in text.CORES.values()]
    training = "\n".join(t for name in TRAINING for t in texts_of(getattr(world, name)))
    assert not [p.pattern for p in patterns if p.search(training)]
    assert not [o for o in text.NEW_OPENERS if o in training]
    heldout = "\n".join(texts_of(world.heldout))
    assert sum(bool(p.search(heldout)) for p in patterns) > 12 and text.NEW_OPENERS[0] in heldout


def test_training_questions_never_ask_about_held_out_items() -> None:
    facts = Facts(0)
    held = {p for p in text.PEOPLE if facts.split_of(f"job/{p}") != "train"}
    assert 6 <= len(held) <= 9  # 24 people, a rounded-up share of each split
    for i in range(2000):
        question = facts.single(random.Random(i), "train")
        assert facts.split_of(question.item) == "train" and not question.new_wording
        items = [p for p in question.topic.get("parts", "").split(";") if p]
        assert all(facts.split_of(item) == "train" for item in items)


def test_every_task_occurs_in_every_split() -> None:
    facts = Facts(3)
    for split in ("train", "dev", "heldout", "pairs"):
        for task in MIX:
            assert facts.single(random.Random(task), split, task).task == task


def test_documents_state_every_fact(world: World) -> None:
    stated = " ".join(d.text for d in world.documents if d.text)
    facts = Facts(0)
    for attribute in (*ATTRIBUTES, "river", "goods"):
        for about, value in facts.of[attribute].items():
            slots = {"p": about, "t": about}
            forms = [f.format(value, **slots) for f in text.STATEMENTS[attribute]]
            assert any(form in stated for form in forms), (attribute, about)
    transcripts = sum(bool(d.messages) for d in world.documents) / len(world.documents)
    assert 0.5 < transcripts < 0.7


def test_perfect_answers_score_one_and_flaws_cost_what_they_should() -> None:
    facts = Facts(0)
    for i in range(600):
        rng = random.Random(i)
        question = facts.single(rng, rng.choice(("train", "heldout")))
        question = (rng.random() < 0.4 and facts.follow(rng, question, "train")) or question
        style = PERFECT.draw(rng)
        good = judge_text(question.key, write(question, style), True)
        assert good.total == pytest.approx(1), (question.ask, write(question, style), good)
        for flaw, part in {"wrong": "correct", "terse": "complete", "curt": "mannered", "rude": "mannered"}.items():
            if question.task == "bad" and flaw == "curt":
                continue
            answer = write(question, replace(style, **{flaw: True}))
            found = judge_text(question.key, answer, True).parts
            assert found[part] < 1, (flaw, question.ask, answer)
            assert is_correct(question.key, answer) == bool(found["correct"])
        cut = judge_text(question.key, write(question, replace(style, unfinished=True)), True)
        assert cut.parts["ended"] == 0
        assert judge_text(question.key, write(question, replace(style, rambling=True)), True).total > 0.85


def test_wrong_answers_also_miss_the_question() -> None:
    facts = Facts(0)
    for i in range(100):
        question = facts.single(random.Random(i), "train", random.Random(i).choice(ASTRAY))
        parts = [judge_text(question.key, claim.full[0], True).parts for claim in question.wrongs]
        assert [p["correct"] for p in parts] == [0.0] * 6
        assert 0.0 in [p["complete"] for p in parts[2:]]  # true of something else


def test_a_wrong_claim_in_the_same_form_differs_in_correctness_alone() -> None:
    facts = Facts(0)
    for i in range(300):
        rng = random.Random(i)
        question = facts.any(rng, rng.choice([task for task in MIX if task not in ("bad", "check")]))
        scores = [judge_text(question.key, write(question, Style(wrong=w, seed=i)), True).parts for w in (False, True)]
        assert {p for p in scores[0] if scores[0][p] != scores[1][p]} == {"correct"}


def test_words_of_form_name_no_value() -> None:
    """A courtesy, a rudeness or a ramble may not change what an answer says."""
    said = (
        *text.COURTEOUS_OPENERS, *text.COURTEOUS_CLOSERS, *text.RUDE_OPENERS, *text.RUDE_CLOSERS, *text.RAMBLES,
        *(r for reactions in text.REACTIONS.values() for r in reactions[:1] if "No," not in r),
    )  # fmt: skip
    assert all(named(s)[1] == {} for s in said)


# -- what training may see -----------------------------------------------------------------------------------


def test_training_records_hold_no_score_and_no_key(world: World) -> None:
    allowed = {
        "documents": {"text", "messages"}, "conversations": {"messages"}, "perfect_conversations": {"messages"},
        "comparisons": {"prompt", "completions"}, "heldout_pairs": {"prompt", "completions"},
        "prompts": {"id", "messages", "source"}, "dev": {"id", "messages", "source"},
        "heldout": {"id", "messages", "source"},
    }  # fmt: skip
    for name, keys in allowed.items():
        for record in getattr(world, name):
            row = to_json(record)
            assert set(row) <= keys, name
            for message in row.get("messages", []) + row.get("prompt", []):
                assert set(message) == {"role", "content"}
            for completion in row.get("completions", []):
                assert set(completion) == {"text", "rank"} and type(completion["rank"]) is int
    assert {p.source for p in world.prompts} <= set(MIX)
    assert all(p.id == f"heldout-{i}" for i, p in enumerate(world.heldout))


def test_no_training_text_holds_what_the_judge_writes(world: World) -> None:
    training = "\n".join(json.dumps(to_json(r)) for name in TRAINING for r in getattr(world, name))
    for word in ("mentions", "frames", "budget", "score", "gold", "correct", '"key"'):
        assert word not in training
    assert not re.search(r"\d\.\d", training)  # no number with decimals anywhere


def test_labels_are_noisy_and_their_order_in_the_record_says_nothing(world: World) -> None:
    keys = dict(world.judge)
    right, first_wins, pairs = 0, 0, 0
    for c in world.comparisons:
        totals = [judge_text(keys[c.prompt], x.text, True).total for x in c.completions]
        for better, worse in c.pairs():
            right += totals[better] > totals[worse] or (totals[better] == totals[worse] and better < worse)
            first_wins += better < worse
            pairs += 1
    assert 0.80 < right / pairs < 0.97
    assert 0.43 < first_wins / pairs < 0.57


def test_the_judge_has_a_key_for_every_prompt(world: World) -> None:
    keys = dict(world.judge)
    assert len(keys) == len(world.judge)
    for name in ("comparisons", "heldout_pairs", "prompts", "dev", "heldout"):
        assert all(messages_of(r) in keys for r in getattr(world, name)), name


def test_demonstrators_flaws_come_at_their_own_rates() -> None:
    drawn = [CROWD.draw(random.Random(i)) for i in range(4000)]
    for flaw in ("wrong", "terse", "curt", "rude", "rambling", "unfinished"):
        assert sum(getattr(s, flaw) for s in drawn) / 4000 == pytest.approx(getattr(CROWD, flaw), abs=0.03)


def test_perfect_conversations_answer_the_same_requests(world: World) -> None:
    for flawed, perfect in zip(world.conversations, world.perfect_conversations, strict=True):
        asked = [[m.content for m in c.messages if m.role == "user"] for c in (flawed, perfect)]
        assert asked[0] == asked[1]
    assert sum(len(c.messages) > 2 for c in world.conversations) > 20


def test_labellers_follow_bradley_and_terry() -> None:
    labellers = Labellers(temperature=0.2, mistakes=0.0)
    rng = random.Random(0)
    wins = sum(labellers.rank([0.2, 0.0], rng)[0] == 0 for _ in range(5000)) / 5000
    assert wins == pytest.approx(0.731, abs=0.02)  # sigmoid(1)
    careless = Labellers(temperature=1e-6, mistakes=0.25)
    wins = sum(careless.rank([1.0, 0.0], rng)[0] == 0 for _ in range(5000)) / 5000
    assert wins == pytest.approx(0.75, abs=0.02)
    assert sorted(labellers.rank([0.1, 0.4, 0.3, 0.2], rng)) == [0, 1, 2, 3]


def test_the_stage_writes_what_readers_read(tmp_path: Path) -> None:
    sizes = {"documents": 30, "heldout_documents": 5, "conversations": 10, "comparisons": 12, "heldout_pairs": 8,
             "prompts": 9, "dev": 7, "heldout": 6, "long_documents": 4, "heldout_long_documents": 2}  # fmt: skip
    request = Request(
        row="world", stage="world", target="pipeline.data.world_stage:WorldStage", fingerprint="f", seed=0,
        config={"seed": 2, **sizes}, inputs={}, identity={}, partial=str(tmp_path),
    )  # fmt: skip
    manifest = run_stage(request, lambda event: None)
    assert manifest is not None
    assert set(manifest["outputs"]) == set(WorldStage.Outputs.__dataclass_fields__)
    found = {name: tmp_path / "out" / name / "data.jsonl" for name in sizes}
    expected = build_world(2, Sizes(**sizes))
    for name, read in {
        "documents": read_documents, "conversations": read_conversations, "comparisons": read_comparisons,
        "heldout": read_prompts,
    }.items():  # fmt: skip
        assert [unsourced(r) for r in read(found[name])] == [unsourced(r) for r in getattr(expected, name)], name
    assert manifest["metrics"]["judge"] == len(expected.judge)


def test_biased_labellers_see_worth_in_words():
    """The same answers under the same noise: with a bias of 10 a word the longest one always wins but for mistakes."""
    answers, totals = ["a b c", "a", "a b"], [0.0, 1.0, 0.5]
    fair, biased = Labellers(mistakes=0.0, temperature=1e-6), Labellers(mistakes=0.0, length_bias=10.0)
    assert fair.label(answers, totals, random.Random(0)) == [2, 0, 1]
    assert biased.label(answers, totals, random.Random(0)) == [0, 2, 1]
    sizes = Sizes(**dict.fromkeys(Sizes.__dataclass_fields__, 30))
    one, two = build_world(0, sizes), build_world(0, sizes, length_bias=0.5)
    assert one.prompts == two.prompts and one.conversations == two.conversations and one.judge == two.judge
    texts = lambda world: [{c.text for c in x.completions} for x in world.comparisons]
    assert texts(one) == texts(two) and one.comparisons != two.comparisons
