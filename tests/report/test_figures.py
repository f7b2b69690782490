from __future__ import annotations

import copy
import json

import pytest
from rich.console import Console

from pipeline.report.figures import Gate, chain_gates, figures


def between(mean: float, half: float = 0.02) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "count": 100}


def evaluation(temperature: float = 1.0) -> dict:
    gold = {"pretrain": 0.3, "sft": 0.6, "sft@perfect": 0.9, "ppo": 0.7, "dpo": 0.8}
    policies = {}
    for name, score in gold.items():
        wins = {o: between(0.5 + (score - g)) for o, g in gold.items() if o != name}
        policies[name] = {
            "gold": score,
            "win_rate": None if name == "sft" else {"vs": "sft", **wins["sft"]},
            "win_rate_parts": {} if name == "sft" else {"correct": between(0.5 + (score - 0.6) / 2)},
            "stop_rate": 0.995,
            "against": {o: {"win_rate": wins[o], "difference": between(score - gold[o])} for o in gold if o != name},
        }
    return {
        "temperature": temperature,
        "policies": policies,
        "reward_model": {
            "clear": between(0.8),
            "clear_labellers": between(0.84),
            "correctness": between(0.65),
        },
        "best_of_n": {"rows": [{"n": 8, "by_reward": between(0.8), "by_gold": between(0.9),
                                "recovered": between(2 / 3), "kl_bound": 1.2}]},
    }  # fmt: skip


def run(seed: int | None = 0, *evaluations: dict) -> dict:
    rows = [{"row": "ppo", "stage": "ppo", "metrics": {"explained_variance": 0.4}}]
    for i, e in enumerate(evaluations or (evaluation(),)):
        rows.append({"row": f"evaluate@{i}", "stage": "evaluate", "metrics": e})
    return {"run": f"quickstart-{seed}", "seed": seed, "rows": rows}


GATES = chain_gates(chain=("ppo", "dpo"), from_sft={"ppo": 0.6})


def status(result, gate: str) -> str:
    (row,) = [r for r in result.rows if r["gate"] == gate]
    return row["status"]


def test_gates_of_the_chain():
    result = figures([run()], GATES)
    assert status(result, "sft above pretrain") == "met"
    assert status(result, "sft@perfect: share of the best attainable") == "met"
    assert status(result, "dpo not below its input ppo") == "met"
    assert status(result, "dpo wins over sft") == "met"
    assert status(result, "dpo: way to best of 8 by gold") == "met"  # 0.2 of 0.3
    assert status(result, "ppo (from sft) wins over sft") == "met"
    assert status(result, "dpo: wins on correctness") == "met"
    assert status(result, "reward model: clear pairs") == "met"  # below 0.85, within 5 points of the labellers
    assert status(result, "reward model: correctness alone") == "missed"
    assert status(result, "ppo: explained variance") == "met"
    assert [r["gate"] for r in result.missed] == ["reward model: correctness alone"]


def test_a_win_rate_needs_its_interval_above_one_half_too():
    shaky = evaluation()
    shaky["policies"]["ppo"]["win_rate"] = {"vs": "sft", **between(0.7, half=0.25)}
    assert status(figures([run(0, shaky)], GATES), "ppo (from sft) wins over sft") == "missed"


def test_differences_are_judged_by_their_intervals():
    tie = evaluation()
    tie["policies"]["dpo"]["against"]["ppo"]["difference"] = between(-0.01)
    tie["policies"]["sft"]["against"]["pretrain"]["difference"] = between(0.01)
    result = figures([run(0, tie)], GATES)
    assert status(result, "dpo not below its input ppo") == "met"  # lower, but not significantly
    assert status(result, "sft above pretrain") == "missed"  # higher, but not significantly
    tie["policies"]["dpo"]["against"]["ppo"]["difference"] = between(-0.03)
    assert status(figures([run(0, tie)], GATES), "dpo not below its input ppo") == "missed"


def test_the_gap_prefers_what_was_recorded():
    recorded = evaluation()
    recorded["policies"]["dpo"]["gap_closed"] = between(0.3)
    assert status(figures([run(0, recorded)], GATES), "dpo: way to best of 8 by gold") == "missed"


def test_the_best_attainable_score_may_be_below_one():
    low = evaluation()
    low["attainable"] = 0.95
    low["policies"]["sft@perfect"]["gold"] = 0.81
    (row,) = [r for r in figures([run(0, low)], GATES).rows if "attainable" in r["gate"]]
    assert row["status"] == "met" and row["value"] == pytest.approx(0.81 / 0.95)


def test_what_was_not_measured_is_said():
    empty = {"run": "r", "rows": [{"row": "sft", "stage": "sft", "metrics": {"loss": 1.0}}]}
    result = figures([empty], GATES)
    assert {r["status"] for r in result.rows} == {"not measured"} and len(result.rows) == len(GATES)
    assert all(r["note"] for r in result.rows)
    assert {r["note"] for r in result.rows if r["gate"] in ("sft above pretrain", "reward model: clear pairs")} == {
        "no evaluation row"
    }
    bare = {"temperature": 1.0, "policies": {"sft": {"gold": 0.5}}}
    assert {r["status"] for r in figures([run(0, bare)], GATES).rows} == {"not measured", "met"}


def test_what_an_evaluation_row_lacks_is_named():
    """No judge, no pairs, one policy less, nothing drawn for the best of 8."""
    found = evaluation()
    del found["policies"]["sft@perfect"]
    for policy in found["policies"].values():
        del policy["gold"], policy["against"], policy["win_rate"]
    found |= {"decided_by": None, "reward_model": None, "best_of_n": None}
    notes = {r["gate"]: r["note"] for r in figures([run(0, found)], GATES).rows}
    assert notes["sft@perfect above sft"] == "add sft@perfect to `policies`"
    assert notes["ppo above sft"] == "wire a `judge` or a `reward`"
    assert notes["dpo: wins on correctness"] == "make sft the `reference`, and wire a `judge`"
    assert notes["reward model: clear pairs"] == "wire `reward`, `pairs` and a `judge`"
    assert notes["best of 8 by reward: gain recovered"] == "set best_of: 8, with a `judge` and `reward`"
    found |= {"decided_by": "proxy", "reward_model": {"labels": between(0.7), "clear": None}}
    notes = {r["gate"]: r["note"] for r in figures([run(0, found)], GATES).rows}
    assert notes["reward model: clear pairs"] == notes["reward model: correctness alone"] == "wire a `judge`"


def test_one_reading_for_each_seed_and_temperature():
    result = figures([run(s, evaluation(1.0), evaluation(0.7)) for s in (0, 1)], GATES)
    wins = [r for r in result.rows if r["gate"] == "dpo wins over sft"]
    assert [(r["seed"], r["temperature"]) for r in wins] == [(0, 1.0), (0, 0.7), (1, 1.0), (1, 0.7)]
    variance = [r for r in result.rows if r["gate"] == "ppo: explained variance"]
    assert [(r["seed"], r["temperature"]) for r in variance] == [(0, None), (1, None)]


def test_a_gate_is_read_where_it_was_measured():
    """Two evaluation rows of one temperature: perfect demonstrations may be judged in a row of their own."""
    without = evaluation()
    del without["policies"]["sft@perfect"]
    result = figures([run(0, without, evaluation())], GATES)
    assert status(result, "sft@perfect: share of the best attainable") == "met"


def test_policies_may_be_named_by_their_artifact():
    named = json.loads(json.dumps(evaluation()).replace('"sft"', '"sft.policy"').replace('"dpo"', '"dpo.policy"'))
    result = figures([run(0, named)], GATES)
    assert status(result, "dpo wins over sft") == "met" and status(result, "dpo above sft") == "met"


def test_the_table_of_the_readme():
    gate = Gate("dpo wins over sft", "wins", 0.65, policy="dpo", other="sft")
    text = figures([run(0), run(1)], [gate]).render_markdown()
    assert text.startswith("**gates at temperature 1**\n")
    assert "| gate | target | seed 0 | seed 1 |" in text
    cell = "0.700 [0.680, 0.720] met"
    assert f"| dpo wins over sft | ≥ 0.65, interval above 0.5 | {cell} | {cell} |" in text
    assert "2 met, 0 missed, 0 not measured." in text
    assert "**seed 1, evaluate@0, temperature 1**" in text  # the figures behind the gates


def test_runs_without_a_seed_go_by_their_name():
    unnamed = run(None)
    assert "| gate | target | quickstart-None |" in figures([unnamed], GATES, details=False).render_markdown()


def test_json_and_terminal():
    result = figures([run()], GATES)
    document = json.loads(result.render_json())
    assert document["missed"] == 1
    assert set(document["figures"][0]) == {
        "run", "seed", "temperature", "gate", "value", "low", "high", "target", "status", "note",
    }  # fmt: skip
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result.render_rich())
    assert "missed" in console.export_text()


def test_gates_can_come_from_a_file():
    given = {"name": "short", "measure": "policy_metric", "target": 0.9, "policy": "sft", "key": "stop_rate"}
    assert figures([run()], [given]).rows[0]["status"] == "met"
    with pytest.raises(ValueError, match="no measure 'luck'; there are: wins"):
        figures([run()], [{**given, "measure": "luck"}])


def test_inputs_are_left_alone():
    before = run()
    after = copy.deepcopy(before)
    figures([after], GATES)
    assert before == after
