from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.flow.errors import Damaged
from pipeline.report.overoptimisation import (
    Parting,
    curve_of,
    curves_grid,
    page,
    read_lines,
    said,
    ticks,
    wanted,
)


def dev(step: int, kl: float | None, **scores: float | None) -> dict[str, Any]:
    return {"step": step, "dev/kl": kl, **{f"dev/{name}": value for name, value in scores.items()}}


TURNING = [
    {"step": 1, "kl": 0.0, "score": -0.1},
    dev(2, 1.0, proxy=0.2, heldout=0.2, gold=0.5) | {"kl": 0.5, "score": 0.1},
    dev(4, 4.0, proxy=0.6, heldout=0.5, gold=0.7),
    dev(6, 9.0, proxy=0.9, heldout=0.4, gold=0.6),
]


def test_a_curve_and_its_turning_points() -> None:
    """Best at step 4; from there proxy rises 0.6 -> 0.9, held-out falls 0.5 -> 0.4 and gold 0.7 -> 0.6."""
    curve = curve_of("ppo", TURNING, {"dev/kept_step": 4, "dev/kl_budget": 5.0})
    assert [(p.step, p.kl) for p in curve.points] == [(2, 1.0), (4, 4.0), (6, 9.0)]
    assert [(p.step, p.kl, p.scores) for p in curve.sampled] == [(1, 0.0, {"proxy": -0.1}), (2, 0.5, {"proxy": 0.1})]
    assert curve.document()["best"] == {"proxy": 6, "heldout": 4, "gold": 4}
    assert (curve.kept, curve.budget, curve.missing) == (4, 5.0, [])
    assert curve.parted() == [
        Parting("heldout", 4, 4.0, 6, pytest.approx(0.3), pytest.approx(-0.1)),
        Parting("gold", 4, 4.0, 6, pytest.approx(0.3), pytest.approx(-0.1)),
    ]
    assert said([curve])[0] == (
        "ppo: proxy and held-out part after step 4 (KL 4.00): until step 6 proxy +0.300, held-out -0.100."
    )


@pytest.mark.parametrize(
    ("proxy", "gold"),
    [
        ([0.2, 0.6, 0.9], [0.5, 0.6, 0.7]),  # both rise
        ([0.2, 0.6, 0.5], [0.5, 0.7, 0.6]),  # both fall: nothing is exploited
        ([0.2, 0.6, 0.9], [0.5, 0.7, 0.7]),  # stays
    ],
)
def test_no_parting_where_proxy_does_not_rise_past_a_fall(proxy: list[float], gold: list[float]) -> None:
    lines = [dev(i, float(i), proxy=p, gold=g) for i, (p, g) in enumerate(zip(proxy, gold, strict=True))]
    assert curve_of("ppo", lines, {}).parted() == []


def test_points_stand_in_the_order_of_steps_and_count_as_they_were_last() -> None:
    lines = [dev(4, 2.0, gold=0.6), dev(2, 1.0, gold=0.5), dev(4, 3.0, gold=0.7)]
    assert [(p.step, p.kl, p.scores["gold"]) for p in curve_of("ppo", lines, {}).points] == [
        (2, 1.0, 0.5),
        (4, 3.0, 0.7),
    ]


def test_the_first_of_equal_bests_is_best() -> None:
    lines = [dev(1, 1.0, gold=0.7), dev(2, 2.0, gold=0.7)]
    assert curve_of("ppo", lines, {}).document()["best"] == {"gold": 1}


def test_what_is_not_finite_is_not_there() -> None:
    """null is how NaN is logged; NaN and infinities that get through anyway, text and true are no points either."""
    nan, inf = float("nan"), float("inf")
    lines = [dev(1, nan, gold=0.5), dev(2, 1.0, gold=nan, proxy=0.1), dev(3, inf, gold=1.0), dev(4, 2.0, gold=None),
             {"step": 5, "kl": None, "score": 0.1}, {"step": 6, "kl": True, "score": 0.1},
             {"step": 7, "kl": 1.0, "score": "x"}, {"loss": 1.0}]  # fmt: skip
    curve = curve_of("ppo", lines, {"dev/kept_step": nan, "kl_budget": None})
    assert [(p.step, p.scores) for p in curve.points] == [(2, {"proxy": 0.1})]
    assert curve.sampled == [] and curve.kept is None and curve.budget is None
    assert curve.missing == ["2 steps have dev scores but no dev/kl to place them by", "no dev/heldout", "no dev/gold"]


def test_intervals_count_by_their_means() -> None:
    curve = curve_of("ppo", [{"step": 1, "dev/kl": 1.0, "dev/gold": {"mean": 0.5, "low": 0.4, "high": 0.6}}], {})
    assert curve.points[0].scores == {"gold": 0.5}


def test_what_is_missing_is_said() -> None:
    nothing = curve_of("dpo", [{"step": 1, "loss": 0.7}], {})
    assert not nothing and nothing.missing == ["no dev scores (dev/proxy, dev/heldout, dev/gold with dev/kl)"]
    sampled = curve_of("ppo", [{"step": 1, "kl": 0.1, "score": 0.2}], {})
    assert sampled and sampled.missing == nothing.missing
    assert said([nothing, sampled]) == ["dpo, ppo: no dev scores (dev/proxy, dev/heldout, dev/gold with dev/kl)."]
    kept = curve_of("ppo", TURNING, {"dev/kept_step": 5})
    assert kept.missing == ["step 5, which was kept, has no dev scores"]


def test_a_parting_in_words() -> None:
    assert str(Parting("gold", 8, 1.25, 12, 0.5, -0.25)) == (
        "proxy and gold part after step 8 (KL 1.25): until step 12 proxy +0.500, gold -0.250"
    )


def test_rows_that_belong_into_the_picture() -> None:
    assert wanted("ppo", []) and wanted("dpo@sft", []) and wanted("rejection@2", [])
    assert not wanted("sft", [{"step": 1, "loss": 1.0}]) and wanted("sft", [dev(1, 0.0, gold=0.5)])


def test_the_table_marks_what_was_kept_best_and_beyond() -> None:
    grid = curves_grid([curve_of("ppo", TURNING, {"kept_step": 4, "kl_budget": 5}), curve_of("dpo", TURNING[:1], {})])
    assert grid.head == ["row", "step", "KL, nats", "proxy reward", "held-out reward", "gold score", ""]
    assert grid.rows == [
        ["ppo", "2", "1.000", "0.200", "0.200", "0.500", ""],
        ["ppo", "4", "4.000", "0.600", "0.500", "0.700", "kept, best held-out, best gold"],
        ["ppo", "6", "9.000", "0.900", "0.400", "0.600", "best proxy, over the KL budget"],
        ["dpo", "1", "0.000", "-0.100", "–", "–", "own samples"],
    ]
    assert curves_grid([curve_of("dpo", TURNING[:1], {})]).rows == [["dpo", "1", "0.000", "-0.100", "own samples"]]


def test_lines_of_a_file(tmp_path: Path) -> None:
    """A row at work may be in the middle of its last line; any other bad line is damage."""
    path = tmp_path / "ppo.jsonl"
    assert read_lines(path) == []
    path.write_text('{"step": 1}\n{"step": 2, "kl"')
    assert read_lines(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step": 2, "kl"\n{"step": 3}\n')
    with pytest.raises(Damaged, match=r"ppo\.jsonl:2: is no JSON object"):
        read_lines(path)
    path.write_text("[1]\n")
    with pytest.raises(Damaged, match=r"ppo\.jsonl:1"):
        read_lines(path)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def places(text: str) -> list[list[tuple[float, float]]]:
    """Corners of every line of the pictures."""
    found = [attrs["points"] or "" for tag, attrs in Page(text).found if tag == "polyline"]
    return [[(float(a), float(b)) for a, b in re.findall(r"([-\d.]+),([-\d.]+)", points)] for points in found]


def test_points_land_where_their_figures_say() -> None:
    """KL 0, 4 and 9 (and the budget 5) onto 64 + 2 % .. 936: x = 64 + 872 * (kl + 0.18) / 9.36; gold upwards."""
    text = page([curve_of("ppo", TURNING, {"dev/kept_step": 4, "dev/kl_budget": 5.0})], "t")
    proxy, heldout, gold = places(text)
    at = lambda kl: round(64 + 872 * (kl + 0.18) / 9.36, 1)
    assert [x for x, _ in gold] == [x for x, _ in proxy] == [x for x, _ in heldout] == [at(1), at(4), at(9)]
    (_, low), (_, high), (_, middle) = gold
    assert low > middle > high and middle == pytest.approx((low + high) / 2, abs=0.1)  # 0.5, 0.7, 0.6
    assert [y for _, y in proxy] == sorted((y for _, y in proxy), reverse=True)
    shapes = Page(text).found
    budget = [a for tag, a in shapes if tag == "line" and a.get("class") == "budget"]
    assert {a["x1"] for a in budget} == {a["x2"] for a in budget} == {f"{at(5):.1f}"} and len(budget) == 2
    rings = [(a["cx"], a["cy"]) for tag, a in shapes if tag == "circle" and a.get("class") == "ring"][
        1:
    ]  # legend first
    assert rings == [(f"{at(4):.1f}", f"{line[1][1]:.1f}") for line in (proxy, heldout, gold)]


def test_a_square_root_scale() -> None:
    """Roots of KL 1, 4 and 9 are 1, 2 and 3: equally far apart."""
    text = page([curve_of("ppo", [dev(i, i * i, gold=0.1 * i) for i in (1, 2, 3)], {})], "t", root=True)
    (gold,) = places(text)
    for value, (x, _) in zip((1, 4, 9), gold, strict=True):
        assert re.search(rf'<text x="{x}" y="[\d.]+" text-anchor="middle">{value}</text>', text)
    one, two, three = (x for x, _ in gold)
    assert two - one == pytest.approx(three - two, abs=0.11) and two - one > 200
    below = page([curve_of("ppo", [dev(1, -0.04, gold=0.1), dev(2, 1.0, gold=0.2)], {})], "t", root=True)
    assert places(below)[0][0][0] >= 64


def test_one_point_is_drawn_and_no_point_is_said() -> None:
    text = page([curve_of("ppo", [dev(1, 0.0, gold=0.5)], {"kl_budget": 100})], "t")
    assert Page(text).tags.count("svg") == 2 and places(text) == []  # the legend's and one panel's, no line
    (x,) = (
        float(a["cx"] or 0) for tag, a in Page(text).found if tag == "circle" and a["r"] == "4.5" and a["cx"] != "17.0"
    )
    assert 64 < x < 100  # no distance was gone, and none goes below 0
    assert "the KL budget of 100 nats is beyond the picture" in text and not re.search(r"\bnan\b", text)
    text = page([curve_of("ppo", [], {})], "t")
    assert "svg" not in Page(text).tags and "There is nothing to draw" in text and "ppo: no dev scores" in text
    page([], "t")


def test_own_samples_are_joined_only_where_there_is_nothing_better() -> None:
    assert len(places(page([curve_of("ppo", TURNING, {})], "t"))) == 3
    only = [{"step": i, "kl": 0.1 * i, "score": 0.1 * i} for i in range(3)]
    assert [len(line) for line in places(page([curve_of("ppo", only, {})], "t"))] == [3]


def test_several_rows_have_their_own_colour_and_marker() -> None:
    text = page([curve_of(name, TURNING, {}) for name in ("ppo", "rejection", "dpo")], "t")
    strokes = {a.get("stroke") for tag, a in Page(text).found if tag == "polyline"}
    assert strokes == {"var(--c0)", "var(--c1)", "var(--c2)"}
    assert {"circle", "polygon"} <= set(Page(text).tags)
    for name in ("ppo", "rejection", "dpo"):
        assert f"</svg>{name}</li>" in text and f"{name}, step 4: KL 4.000, proxy 0.600" in text


def test_the_page_needs_neither_network_nor_scripts_and_nothing_breaks_out() -> None:
    evil = '</svg><script>alert(1)</script>" onload="x\x1b'
    text = page([curve_of(evil, TURNING, {"kept_step": 4, "kl_budget": 5}, run=evil)], evil)
    found = Page(text)
    assert found.open == [] and "script" not in found.tags and "url(" not in text and "\x1b" not in text
    assert not any(key.startswith("on") or key in ("href", "src") for _, attrs in found.found for key in attrs)
    assert "default-src 'none'" in text


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 9.0, 8) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    assert ticks(0.513, 0.527, 5)[:3] == [0.514, 0.516, 0.518]
    for low, high in ((-1e-3, 3.7e-3), (1e5, 9e5), (-5.0, -1.0)):
        found = ticks(low, high)
        assert 3 <= len(found) <= 10 and low <= found[0] and found[-1] <= high


def test_the_document_is_json() -> None:
    document = curve_of("ppo", TURNING, {"dev/kept_step": 4}, run="r").document()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["points"][0] == {"step": 2, "kl": 1.0, "proxy": 0.2, "heldout": 0.2, "gold": 0.5}
    assert document["parted"][0]["score"] == "heldout" and document["run"] == "r"
