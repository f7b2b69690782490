from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks import ppo, preference, preference_rival, shapes
from tests.benchmarks.common import Clock, Contestant, Figure, matmul_rate, require_same, table
from tests.benchmarks.sft import Task


def test_a_figure_has_the_documented_shape() -> None:
    line = Figure("sft", "best: padded", 300.0, 200.0, "tokens/s", ceiling_share=0.25, peak_mb_ours=512.0).line()
    assert json.loads(json.dumps(line)) == {
        "bench": "sft",
        "case": "best: padded",
        "ours": 300.0,
        "rival": 200.0,
        "ratio": 1.5,
        "unit": "tokens/s",
        "ceiling": 1200.0,
        "ceiling_share": 0.25,
        "peak_mb_ours": 512.0,
        "peak_mb_rival": None,
    }
    assert Figure("x", "y", 2.0, 4.0, "seconds", higher_is_better=False).line()["ratio"] == 2.0
    assert "best: padded" in table([line])


def test_sorting_keeps_every_step_its_records() -> None:
    plain, ordered = Task(turns=1), Task(turns=1, ordered=True)
    for at in range(0, len(plain.records()), plain.batch):
        step = slice(at, at + plain.batch)
        assert sorted(plain.records()[step]) == sorted(ordered.records()[step])
    assert {len(r) for r in plain.records()} <= set(range(32, 257))


def test_the_ceiling_is_the_rate_of_the_products_alone_and_shares_of_time_are_said() -> None:
    line = Figure("ppo", "equal", 3.0, 1.0, "episodes/s", ceiling_share=0.5, where_ours={"updates": 60.0}).line()
    assert line["ceiling"] == 6.0
    assert line["where_ours"] == {"updates": 60.0} and "where_rival" not in line
    assert "equal, ours: updates 60 %" in table([line])


def test_the_best_product_of_the_precision_is_the_ceiling() -> None:
    """150 and 280 GFLOP/s in float32, the best of all rounds; bfloat16 has its own."""
    rounds = [{"mkl": 150.0, "onednn": 280.0, "bf16": 500.0}, {"mkl": 160.0, "onednn": 250.0, "bf16": 490.0}]
    assert matmul_rate(rounds) == 280e9
    assert matmul_rate(rounds, "bf16") == 500e9


def test_a_turn_is_split_into_phases_and_what_is_left() -> None:
    clock = Clock()
    clock.add("generation", 1.0)
    clock.add("generation", 0.5)
    assert clock.read(2.0) == {"generation": 1.5, "rest": 0.5}
    assert clock.read(0.0) == {"rest": 0.0}


def contestant(**turns: list[float]) -> Contestant:
    made = object.__new__(Contestant)  # without its process
    made.name = "ours"
    made.turns = [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]
    made.ready = {}
    return made


def test_rates_are_medians_and_a_disturbed_turn_counts_for_little() -> None:
    ours = contestant(rate=[10.0, 1.0, 12.0], cpu_rate=[5.0, 4.0, 6.0])
    assert (ours.median("rate"), ours.mean("rate"), ours.spread("rate")) == (10.0, 23 / 3, (1.0, 12.0))


def test_shares_of_time_are_those_of_all_turns_together() -> None:
    """1 + 3 of 8 seconds."""
    ours = contestant(seconds=[{"generation": 1.0, "updates": 1.0}, {"generation": 3.0, "updates": 3.0}])
    assert ours.where() == {"generation": 50.0, "updates": 50.0}


def test_contestants_that_compute_something_else_end_the_run() -> None:
    one, other = contestant(), contestant()
    other.name = "rival"
    one.ready, other.ready = {"first_loss": [1.0, 2.0]}, {"first_loss": [1.0, 2.00001]}
    require_same([one, other], "first_loss", 2e-5)
    with pytest.raises(SystemExit, match="first_loss of rival is off by 1e-05"):
        require_same([one, other], "first_loss", 1e-6)


TOY = {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "vocabulary": 10}


def test_operations_by_hand() -> None:
    """Heads of 8: q and o 16 x 16, k and v 16 x 8, three times 16 x 32: 2304 weights, 4608 operations a token.

    A token and one it sees: 4 * 2 heads * 8 = 64. A prompt of 2 sees 3 pairs, an answer of 1 behind it 3 more.
    """
    toy = shapes.Shape(**TOY)
    assert shapes.pairs(0, 3) == 6 and shapes.pairs(2, 1) == 3
    assert toy.trunk(3, 6) == 3 * 4608 + 6 * 64
    assert toy.head(2) == 2 * 2 * 16 * 10
    assert toy.reading(2, [1, 1]) == 4 * 4608 + (3 + 3 + 3) * 64
    assert toy.sampling(2, [2]) == (3 * 4608 + 6 * 64) + 640


def test_an_iteration_of_ppo_by_hand() -> None:
    """One episode of 2 + 1 tokens, one epoch. Reading it: 14208, its head: 320.

    Sampling reads the prompt alone and draws once; value, reward and reference read all; an update is three passes of
    policy and value model.
    """
    task = ppo.Task(**TOY, epochs=1)
    assert task.operations([2], [1]) == (9408 + 320) + (3 * 14208 + 320) + 3 * (2 * 14208 + 320)
    assert ppo.Task().updates == 16


def test_the_rivals_see_the_same_records() -> None:
    """A ranking of 3 becomes the pairs 1-2, 1-3, 2-3; sorting moves records within a step only."""
    task = preference.Task(**TOY, answers=3, batch=4, steps=2, turns=1)
    prompt, (first, second, third) = task.records()[0]
    rows = preference_rival.rows(task)
    assert rows["chosen_ids"][:3] == [prompt + first, prompt + first, prompt + second]
    assert rows["rejected_ids"][:3] == [prompt + second, prompt + third, prompt + third]
    assert "prompt_ids" not in rows and len(rows["chosen_ids"]) == 3 * len(task.records()) == 3 * 16
    ordered = replace(task, ordered=True)
    for at in range(0, 16, 4):
        assert sorted(task.records()[at : at + 4]) == sorted(ordered.records()[at : at + 4])


def test_a_prompt_has_its_share_of_the_tokens() -> None:
    for share in (0.5, 0.75):
        records = preference.Task(share=share, shortest=40, longest=120, turns=20).records()
        tokens = sum(2 * len(p) + sum(map(len, answers)) for p, answers in records)
        assert abs(sum(2 * len(p) for p, _ in records) / tokens - share) < 0.01


@pytest.mark.parametrize("size", [shapes.SMOKE, shapes.SMALL, shapes.LARGER], ids=["smoke", "small", "larger"])
def test_the_stop_token_is_drawn_as_often_as_said(size: dict[str, int], tmp_path: Path) -> None:
    """One in 64 at every place of any text: answers of about 64 tokens where nothing cuts them."""
    import torch
    from transformers import LlamaForCausalLM

    shape = shapes.Shape(**size)
    shapes.save_models(shape, tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "policy")
    ids = torch.tensor(shapes.draw_ids(shape.vocabulary, [60, 60], seed=0))
    with torch.no_grad():
        chance = model(ids).logits.softmax(-1)[..., shapes.STOP]
    assert abs(float(chance.mean()) * shapes.ANSWER - 1) < 0.1
    assert (chance * shapes.ANSWER - 1).abs().max() < 0.5
