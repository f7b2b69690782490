"""Settings of objectives: room in a window, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.data.objectives import Causal, Denoiser, FillIn, Layout, Prefix, Spans, Ul2


@pytest.mark.parametrize(
    ("objective", "room"),
    [
        (Causal(), 512),
        (Prefix(), 512),
        (FillIn(), 507),  # bos, three marks, eos
        (Spans(), 463),  # 69 hidden in 23 spans: 463 + 2 * 23 + 3 = 512
        (Ul2(), 381),  # 190 hidden in 63 spans: 381 + 2 * 63 + 4 = 511, and one token more would be another span
    ],
)
def test_room_for_text(objective: Layout, room: int):
    assert objective.room(512) == room


def test_the_mixture_of_the_paper():
    """Table 1 of Tay et al. 2022."""
    found = [(d.mode, d.mean_span, d.density) for d in Ul2().denoisers]
    assert found == [
        ("R", 3, 0.15), ("R", 8, 0.15), ("S", None, 0.25),
        ("X", 3, 0.5), ("X", 8, 0.5), ("X", 64, 0.15), ("X", 64, 0.5),
    ]  # fmt: skip


def test_more_spans_than_sentinels_are_refused():
    with pytest.raises(
        ValueError, match=r"sentinels: 22, but a window of 463 tokens has 23 hidden spans .* mean_span 3"
    ):
        Spans(sentinels=22).room(512)
    assert Spans(sentinels=23).room(512) == 463


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "R", "density": 0.15}, "mean_span: goes with"),
        ({"mode": "S", "density": 0.25, "mean_span": 3}, "mean_span: goes with"),
        ({"mode": "S", "density": 0.6}, "density: at most 0.5 under S"),
    ],
)
def test_denoisers_that_contradict_themselves(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Denoiser(**values)
