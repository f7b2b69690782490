from __future__ import annotations

import json

from tests.benchmarks.common import Figure, table
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
