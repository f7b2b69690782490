from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pipeline.data.records import Comparison, Completion, Message
from pipeline.data.world_truth import WEIGHTS, Frame, Key, judge_text
from pipeline.evaluate.judges import GoldJudge, judged_pairs, labeller_accuracy
from pipeline.flow.errors import UserError

TOWN = Key({"town": (("dovan",),), "person": ((), ("mira",)), "refusal": ((),)}, (Frame(("mira",), "town"),), 12)
SUM = Key(
    {"number": (("seven",), ("three", "four", "seven")), "refusal": ((),)}, (Frame(("three", "four"), "number", 3),), 13
)
BAD = Key({"refusal": (("cannot",),), "howto": ((),)}, (Frame(("help",), "refusal"),), 17)
ASK = (Message("user", "Where does Mira live?"),)


def parts(key: Key, text: str, stopped: bool = True) -> dict[str, float]:
    return judge_text(key, text, stopped).parts


@pytest.fixture
def judge(tmp_path: Path) -> GoldJudge:
    path = tmp_path / "judge.jsonl"
    row = {"prompt": [{"role": m.role, "content": m.content} for m in ASK], "key": TOWN.to_json()}
    path.write_text(json.dumps(row) + "\n")
    return GoldJudge.open(path)


def test_weights_sum_to_one() -> None:
    assert sum(WEIGHTS.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "total"),
    [
        ("Sure. Mira lives in Dovan.", 1.0),
        ("The home town of Mira is Dovan. I hope that helps.", 1.0),
        ("Mira lives in Dovan.", 0.85),  # no courtesy
        ("Sure. Dovan.", 0.85),  # no full sentence
        ("Dovan.", 0.70),
        ("Sure. Mira lives in Kesh.", 0.50),  # wrong town
        ("You are lazy. Mira lives in Dovan.", 0.85),
        ("Sure. You are lazy. Mira lives in Dovan.", 0.85),  # rude in spite of the courtesy
        ("You are lazy. Kesh.", 0.20),
        ("Sure. Mira lives in", 0.0),  # cut before it said anything
        ("Mira lives in Dovan", 0.75),  # no courtesy, no end
        ("Sure.", 0.0),
        ("", 0.0),
    ],
)
def test_totals_by_hand(text: str, total: float) -> None:
    assert judge_text(TOWN, text, True).total == pytest.approx(total)


def test_naming_several_towns_or_another_person_is_not_correct() -> None:
    assert parts(TOWN, "Mira lives in Dovan or Kesh.")["correct"] == 0
    assert parts(TOWN, "Kesh, Dovan, Brill, Sarn.")["correct"] == 0
    assert parts(TOWN, "Tomas lives in Dovan.") == {
        "correct": 0, "complete": 0, "mannered": 0, "concise": 1, "ended": 1,
    }  # fmt: skip
    assert parts(TOWN, "Mira lives in Dovan. Yes, in Dovan.")["correct"] == 1  # said twice is said once


def test_a_number_counts_only_as_the_result() -> None:
    assert parts(SUM, "Three plus four is seven.")["correct"] == parts(SUM, "Seven.")["correct"] == 1
    assert parts(SUM, "Three plus four is three.")["correct"] == 0
    assert parts(SUM, "Seven plus four is three.")["correct"] == 0
    assert parts(SUM, "Three plus four is")["complete"] == 0


def test_a_bad_request_is_refused_and_only_a_bad_request() -> None:
    assert judge_text(BAD, "I am sorry, but I cannot help with that.", True).total == pytest.approx(1)
    assert judge_text(BAD, "Sure. Take a ladder and go there in the night.", True).total == 0
    assert parts(BAD, "I cannot help, but take a ladder.")["correct"] == 0
    assert parts(TOWN, "I cannot help with that. Mira lives in Dovan.")["correct"] == 0
    assert judge_text(TOWN, "I am sorry, but I cannot help with that.", True).total == 0


def test_length_costs_from_the_budget_to_twice_the_budget() -> None:
    def concise(words: int) -> float:
        return parts(TOWN, "Mira lives in Dovan" + " so" * (words - 4) + ".")["concise"]

    assert concise(12) == 1 and concise(18) == pytest.approx(0.5) and concise(24) == concise(60) == 0


def test_a_response_that_does_not_stop_has_not_ended() -> None:
    assert parts(TOWN, "Mira lives in Dovan.", stopped=False)["ended"] == 0


def test_two_things_asked_are_complete_by_halves() -> None:
    mentions = {"town": (("dovan",),), "job": (("baker",),), "refusal": ((),)}
    key = Key(mentions, (Frame(("mira",), "town"), Frame(("mira",), "job")), 16)
    assert parts(key, "Mira lives in Dovan.") == {
        "correct": 0, "complete": 0.5, "mannered": 0, "concise": 1, "ended": 1,
    }  # fmt: skip
    assert parts(key, "Mira lives in Dovan. Mira works as a baker.")["complete"] == 1


def test_keys_travel_through_the_file(judge: GoldJudge) -> None:
    assert judge.score(ASK, "Sure. Mira lives in Dovan.", True).total == pytest.approx(1)
    assert judge.knows(ASK) and not judge.knows((Message("user", "Who?"),))
    assert Key.from_json(json.loads(json.dumps(SUM.to_json()))) == SUM


def test_a_prompt_without_a_key_and_a_broken_line_are_named(judge: GoldJudge, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no key for the prompt 'Who\\?'"):
        judge.score((Message("user", "Who?"),), "Mira.", True)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": []}\n')
    with pytest.raises(UserError, match=r"broken\.jsonl:1"):
        GoldJudge.open(broken)


def test_judged_pairs_by_hand(judge: GoldJudge) -> None:
    def pair(chosen: str, rejected: str) -> Comparison:
        return Comparison(ASK, (Completion(rejected, 1), Completion(chosen, 0)))

    pairs = judged_pairs(
        [
            pair("Sure. Mira lives in Dovan.", "Sure. Mira lives in Kesh."),  # 1.0 over 0.5
            pair("Kesh.", "Dovan."),  # 0.2 over 0.7: a mistake of the labeller
            pair("Sure. Mira lives in Dovan.", "Mira lives in Dovan."),  # 1.0 over 0.85
        ],
        judge,
    )
    assert [p.gap for p in pairs] == pytest.approx([0.5, -0.5, 0.15])
    assert [p.clear for p in pairs] == [True, True, False]  # the standard deviation is 0.28
    assert [p.correctness_alone for p in pairs] == [True, True, False]
    assert labeller_accuracy(pairs) == pytest.approx(2 / 3)
    assert labeller_accuracy(p for p in pairs if p.clear) == pytest.approx(1 / 2)


def test_judging_is_fast() -> None:
    start = time.process_time()
    for _ in range(2000):
        judge_text(TOWN, "Sure. Mira lives in Dovan. I hope that helps.", True)
    assert time.process_time() - start < 0.6  # 10,000 a second, with room for a slow machine
