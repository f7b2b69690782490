from __future__ import annotations

from pipeline.report.summary import (
    best_of_n_grid,
    parts_grid,
    passkey_grid,
    passkey_places_grid,
    policies_grid,
    positions_grid,
    reward_grid,
    row_grids,
    summarise,
)

RATE = {"vs": "sft", "mean": 0.7, "low": 0.65, "high": 0.75}
EVALUATION = {
    "temperature": 0.7,
    "policies": {
        "sft": {
            "proxy": 0.0,
            "heldout": None,
            "gold": 0.6,
            "gold_parts": {"correct": 0.5, "ended": 0.9},
            "win_rate": None,
            "kl": 0.0,
            "length": 9.25,
            "stop_rate": 1.0,
            "text_perplexity": 3.456,
        },
        "dpo": {
            "proxy": 1.5,
            "heldout": None,
            "gold": 0.8,
            "gold_parts": {"correct": 0.75, "ended": 1.0},
            "win_rate": RATE,
            "win_rate_parts": {"correct": {"mean": 0.6, "low": 0.55, "high": 0.65}},
            "kl": 2.0,
            "length": 8.0,
            "stop_rate": 0.995,
            "text_perplexity": None,
        },
    },
    "reward_model": {
        "labels": {"mean": 0.7, "low": 0.6, "high": 0.8, "count": 400},
        "length": {"mean": 0.55, "low": 0.5, "high": 0.6, "count": 400, "direction": "shorter"},
        "clear": None,
    },
    "best_of_n": {
        "policy": "sft",
        "rows": [
            {
                "n": 1,
                "by_reward": {"mean": 0.6},
                "by_gold": {"mean": 0.6},
                "recovered": None,
                "kl_bound": 0.0,
            },
            {
                "n": 2,
                "by_reward": {"mean": 0.65},
                "by_gold": {"mean": 0.7},
                "recovered": RATE,
                "kl_bound": 0.19,
            },
        ],
    },
}


def test_policies_against_metrics():
    grid = policies_grid(EVALUATION, "evaluate")
    assert grid.title == "evaluate, temperature 0.7"
    assert "held-out reward" not in grid.head  # nobody has it
    assert grid.head[:3] == ["policy", "wins over sft", "gold"]
    assert grid.rows[0][:3] == ["sft", "–", "0.600"]
    assert grid.rows[1][:3] == ["dpo", "0.700 [0.650, 0.750]", "0.800"]
    assert grid.rows[1][-1] == "–"


def test_parts_of_the_judge():
    grid = parts_grid(EVALUATION)
    assert grid.head == ["policy", "correct", "ended"]
    assert grid.rows[1] == ["dpo", "0.750 (0.60 [0.55, 0.65])", "1.000"]


def test_reward_model_and_best_of_n():
    card = reward_grid(EVALUATION)
    assert [r[0] for r in card.rows] == ["against the labels", "length alone, against the labels"]
    assert "shorter" in card.note
    table = best_of_n_grid(EVALUATION)
    assert table.rows[0] == ["1", "0.600", "0.600", "–", "0.00"]
    assert table.rows[1][3] == "0.70 [0.65, 0.75]"


def test_the_curve_of_a_rejection_row_has_the_columns_that_it_measured():
    """Without a judge the reward alone; of samples of several policies no bound."""
    rows = [
        {"n": 1, "reward": {"mean": 0.1, "low": 0.0, "high": 0.2}, "by_reward": None, "by_gold": None,
         "recovered": None, "kl_bound": 0.0},
        {"n": 2, "reward": {"mean": 0.7, "low": 0.6, "high": 0.8}, "by_reward": None, "by_gold": None,
         "recovered": None, "kl_bound": None},
    ]  # fmt: skip
    metrics = {"score": 0.1, "best_of_n": {"policy": "sft", "rows": rows}}
    (table,) = row_grids(metrics, "rejection")
    assert table.title == "best of n samples of sft" and table.head == ["n", "reward", "KL bound, nats"]
    assert table.rows == [["1", "0.100 [0.000, 0.200]", "0.00"], ["2", "0.700 [0.600, 0.800]", "–"]]
    assert row_grids({"loss": 0.1}, "sft") == []
    assert len(row_grids(EVALUATION, "evaluate")) == 4


def test_without_judge_or_reward_model_only_the_policies_are_shown():
    bare = {"temperature": 1.0, "policies": {"sft": {"length": 3.0}}}
    assert [g.head for g in summarise(bare)] == [["policy", "tokens"]]
    assert len(summarise(EVALUATION)) == 4


def test_the_title_says_on_what_and_by_whom_wins_were_decided():
    known = {**EVALUATION, "prompts": 600, "decided_by": "gold"}
    assert policies_grid(known, "evaluate").title == "evaluate, temperature 0.7, 600 prompts; wins by the judge"
    proxy = policies_grid({**known, "decided_by": "proxy"}, "evaluate").title
    assert proxy.endswith("wins by the reward model that was trained against")
    assert policies_grid(known).rows[1][1] == "0.700 [0.650, 0.750]"


def test_few_prompts_have_no_interval():
    few = policies_grid({**EVALUATION, "prompts": 19, "decided_by": "proxy"})
    assert few.rows[1][1] == "0.700" and few.note == "19 prompts are too few to say how others would go."


def test_contexts_side_by_side() -> None:
    def context(near: float, far: float | None) -> dict:
        buckets = [{"from": 0, "to": 64, "tokens": 9, "perplexity": near}]
        buckets += [{"from": 64, "to": 128, "tokens": 9, "perplexity": far}] if far else []
        keys = [{"length": n, "depth": d, "trials": 4, "accuracy": a, "nll": 1.0}
                for n, d, a in ((64, 0.0, 1.0), (64, 0.5, 0.5), (128, 0.0, 0.25), (128, 0.5, 0.0))]  # fmt: skip
        return {"positions": buckets, "passkey": keys}

    evaluation = {
        "reference": "pretrain",
        "untrained": {"yarn": context(3.0, 8.0)},
        "policies": {"pretrain": {"context": context(2.5, None)}, "sft": {}},
    }
    grid = positions_grid(evaluation)
    assert grid is not None and list(grid.head) == ["policy", "0 to 63", "64 to 127"]
    assert grid.rows == [["pretrain as yarn", "3.00", "8.00"], ["pretrain", "2.50", "–"]]
    grid = passkey_grid(evaluation)
    assert grid is not None and list(grid.head) == ["policy", "64", "128"]
    assert grid.rows[1] == ["pretrain", "0.75 (1.00)", "0.12 (1.00)"]
    grid = passkey_places_grid(evaluation)
    assert grid is not None
    assert grid.rows[2:] == [["pretrain", "64", "1.00", "0.50"], ["pretrain", "128", "0.25", "0.00"]]
    assert positions_grid(EVALUATION) is passkey_grid(EVALUATION) is passkey_places_grid(EVALUATION) is None
