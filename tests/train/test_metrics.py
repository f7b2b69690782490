from __future__ import annotations

import math

import torch

from pipeline.train.metrics import Sums, merge


def test_two_tokens_at_2_and_eight_at_1_make_1_2() -> None:
    sums = Sums()
    sums.add({"loss": (torch.tensor(4.0, requires_grad=True), 2)})
    sums.add({"loss": (8.0, torch.tensor(8))})
    assert sums.means() == {"loss": 1.2}  # a mean of means would say 1.5


def test_ranks_with_unequal_shards_give_the_whole() -> None:
    values = [0.1 * i * i for i in range(37)]
    for ranks in (1, 2, 4):
        bounds = [0, *[3 * (r + 1) ** 2 for r in range(ranks - 1)], len(values)]
        shards = [values[bounds[r] : bounds[r + 1]] for r in range(ranks)]
        parts = [{"x": (math.fsum(s), float(len(s)))} for s in shards]
        total, count = merge(parts)["x"]
        assert abs(total / count - math.fsum(values) / len(values)) < 1e-12


def test_a_rank_may_lack_a_name_and_a_name_without_count_is_left_out() -> None:
    assert merge([{"a": (1.0, 1.0)}, {"b": (2.0, 1.0)}]) == {"a": (1.0, 1.0), "b": (2.0, 1.0)}
    sums = Sums()
    sums.add({"empty": (0.0, 0), "full": (3.0, 2)})
    assert sums.means() == {"full": 1.5}


def test_what_is_not_finite_survives_the_sum() -> None:
    sums = Sums()
    sums.add({"x": (math.inf, 1)})
    sums.add({"x": (-math.inf, 1)})
    assert math.isnan(sums.means()["x"])
