from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline.data.forest import Segment, build
from pipeline.flow.errors import UserError
from pipeline.train.batches import Plan, largest_step, plan_steps, weigh_tokens
from pipeline.train.settings import TrainSettings
from pipeline.train.strategy import Strategy
from tests.train.tiny import records


def ranks(world: int) -> list[Strategy]:
    return [
        Strategy(SimpleNamespace(process_index=rank, num_processes=world))  # type: ignore[arg-type]
        for rank in range(world)
    ]


def test_every_record_once_an_epoch_and_only_the_last_batch_ragged() -> None:
    steps = plan_steps([1] * 10, TrainSettings(epochs=2, batch=4), seed=0)
    assert [len(s) for s in steps] == [4, 4, 4, 4, 4]
    flat = [i for s in steps for i in s]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert [len(s) for s in plan_steps([1] * 10, TrainSettings(batch=4), seed=0)] == [4, 4, 2]


def test_fractions_of_an_epoch_and_steps() -> None:
    assert sum(map(len, plan_steps([1] * 10, TrainSettings(epochs=1.5, batch=4), seed=0))) == 15
    assert [len(s) for s in plan_steps([1] * 3, TrainSettings(steps=4, batch=2), seed=0)] == [2, 2, 2, 2]
    with pytest.raises(UserError, match="nothing to train on"):
        plan_steps([], TrainSettings(), seed=0)


def test_batches_by_tokens() -> None:
    sizes = [3, 5, 2, 7, 4, 4, 1]
    steps = plan_steps(sizes, TrainSettings(batch_tokens=8), seed=0)
    assert sorted(i for s in steps for i in s) == list(range(7))
    assert all(sum(sizes[i] for i in s) <= 8 for s in steps)


def test_batches_grow_by_the_tokens_before_them() -> None:
    """From 2 to 10 tokens in the course of 16: 2 at first, 3 after 2 tokens, 4 after 5 (4.5), 6 after 9 (6.5), 9 after
    15 (9.5), then 10."""
    settings = TrainSettings(batch_tokens=10, batch_start=2, batch_growth=16)
    assert [len(s) for s in plan_steps([1] * 50, settings, seed=0)] == [2, 3, 4, 6, 9, 10, 10, 6]
    assert [largest_step(settings, 10, seen) for seen in (0, 2, 8, 16, 99)] == [2, 3, 6, 10, 10]
    lengths = [3, 1, 2] * 20
    steps = plan_steps(lengths, settings, seed=4)
    before = 0
    for step in steps:
        tokens = sum(lengths[i] for i in step)
        assert tokens <= largest_step(settings, 10, before) or len(step) == 1
        before += tokens
    assert sorted(i for step in steps for i in step) == list(range(60))


def test_a_growing_plan_is_the_same_on_every_number_of_ranks() -> None:
    groups = records(40)
    settings = TrainSettings(batch_tokens=60, batch_start=12, batch_growth=100)
    whole = Plan(groups, settings, seed=5, strategy=ranks(1)[0])
    for world in (2, 3):
        plans = [Plan(groups, settings, seed=5, strategy=s) for s in ranks(world)]
        assert all(plan.steps == whole.steps for plan in plans)
        for step in range(len(whole)):
            assert sorted(i for plan in plans for i in plan.mine(step)) == sorted(whole.steps[step])


def test_ranks_share_every_step_without_overlap() -> None:
    groups = records(11)
    settings = TrainSettings(batch=4)
    whole = Plan(groups, settings, seed=5, strategy=ranks(1)[0])
    for world in (2, 4):
        plans = [Plan(groups, settings, seed=5, strategy=s) for s in ranks(world)]
        for step in range(len(whole)):
            parts = [plan.batch(step) for plan in plans]
            shared = [id(g) for part in parts for g in part.groups]
            assert sorted(shared) == sorted(id(g) for g in whole.batch(step).groups)
            weight = sum(part.weights["tokens"] for part in parts)
            assert weight == whole.batch(step).weights["tokens"]
    assert len(plans[3].batch(2).groups) == 0  # 11 = 4 + 4 + 3: the last rank has only the filler
    assert plans[3].batch(2).filler is groups[whole.steps[2][0]]


def test_tokens_that_nothing_precedes_have_no_weight() -> None:
    root = [Segment([1, 2], weights=[1.0, 1.0])]
    tree = [Segment([1]), Segment([2, 3], 0, [1.0, 1.0]), Segment([], 0), Segment([4], 2, [0.5])]
    orphan = [Segment([]), Segment([5, 6], 0, [1.0, 1.0])]
    assert weigh_tokens([root, tree, orphan]) == {"tokens": 1.0 + 2.5 + 1.0}
    forest = build([root, tree, orphan])
    assert float(forest.weights_T[forest.predictor_T >= 0].sum()) == 4.5


def test_a_record_over_the_budget_is_named() -> None:
    with pytest.raises(UserError, match="record 0 has .* train.token_budget=1"):
        Plan(records(3), TrainSettings(token_budget=1), seed=0, strategy=ranks(1)[0])
