"""Who is evaluated, and under which name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from stages.evaluate import _named, _reference


def output(row: str, digest: str) -> Any:
    return SimpleNamespace(meta={"row": row}, digest=digest * 64)


def test_two_outputs_of_one_row_are_both_evaluated() -> None:
    """`policies: [ppo.average], reference: ppo.policy`."""
    average, policy = output("ppo", "a"), output("ppo", "b")
    named = _named(SimpleNamespace(policies=[average]))
    assert _reference(SimpleNamespace(policies=[average], reference=policy), named) == ("ppo-bbbbbbbb", policy)
    assert named == {"ppo": average, "ppo-bbbbbbbb": policy}
    assert _reference(SimpleNamespace(policies=[average], reference=average), named) == ("ppo", average)
