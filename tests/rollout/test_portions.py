"""Answers on the disk while they are drawn: a killed row draws the rest, to the same bits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.rollout.collect import EncodedPrompts, Rollout, Sampler, encode_prompts
from pipeline.rollout.engine import SamplingSettings
from pipeline.rollout.noise import NoiseKey
from pipeline.rollout.portions import Portions
from tests.small import chat, policy, prompts

SETTINGS = SamplingSettings(samples=2, max_new_tokens=6)


class Killed(Exception):
    pass


class Counting(Sampler):
    """Notes what it is asked, and dies in place of the portion numbered `dies`."""

    def __init__(self, dies: int | None = None) -> None:
        super().__init__(policy().model, chat(), SETTINGS, NoiseKey(0, "row"))
        self.asked: list[list[str]] = []
        self.dies = dies

    def sample(self, encoded: EncodedPrompts, **more: Any) -> Rollout:
        if len(self.asked) == self.dies:
            raise Killed
        self.asked.append([p.id for p in encoded.prompts])
        return super().sample(encoded, **more)


def asked(count: int = 5) -> EncodedPrompts:
    return encode_prompts(prompts(*"abcdefgh"[:count]), chat(), 99, 9)


def portions(place: Path, said: list[str] | None = None, world: int = 1, **more: Any) -> Portions:
    ranks: Any = SimpleNamespace(world=world, main=True, gather=lambda x: [x], share=lambda sizes: range(len(sizes)))
    return Portions(place, ranks, (said if said is not None else []).append, size=4, **more)


def test_a_killed_row_draws_the_rest_to_the_same_bits(tmp_path: Path) -> None:
    """Two answers to each of five prompts, four answers a portion: p0 p1, p2 p3, p4."""
    whole = portions(tmp_path / "whole").sample("a", Counting(), asked())
    with pytest.raises(Killed):
        portions(tmp_path / "cut").sample("a", first := Counting(dies=2), asked())
    assert first.asked == [["p0", "p1"], ["p2", "p3"]]
    done: list[tuple[int, int]] = []
    again = portions(tmp_path / "cut").sample("a", rest := Counting(), asked(), progress=lambda *n: done.append(n))
    assert rest.asked == [["p4"]] and done[-1] == (10, 10)
    assert again == whole and [s.prompt.id for s in again.samples[::2]] == ["p0", "p1", "p2", "p3", "p4"]
    plain = Counting().sample(asked())
    assert [s.ids for s in plain.samples] == [s.ids for s in whole.samples]
    portions(tmp_path / "cut").sample("a", nothing := Counting(dies=0), asked())
    assert nothing.asked == []


def test_other_names_and_numbers_of_ranks_draw_for_themselves(tmp_path: Path) -> None:
    portions(tmp_path).sample("a", Counting(), asked(2))
    for other in (portions(tmp_path).sample, portions(tmp_path, world=2).sample):
        with pytest.raises(Killed):
            other("b" if other.__self__.world == 1 else "a", Counting(dies=0), asked(2))  # type: ignore[attr-defined]


@pytest.mark.parametrize("damage", [b"", b"x", None])
def test_a_damaged_portion_is_named_and_drawn_again(tmp_path: Path, damage: bytes | None) -> None:
    whole = portions(tmp_path).sample("a", Counting(), asked())
    second = sorted(tmp_path.iterdir())[1]
    body = second.read_bytes()
    second.write_bytes(body[:-1] + b" " if damage is None else damage)
    (tmp_path / ".tmp-a.000001.of1").write_bytes(body[:10])  # a write that was cut off
    said: list[str] = []
    again = portions(tmp_path, said).sample("a", rest := Counting(), asked())
    assert rest.asked == [["p2", "p3"]] and again == whole
    assert said == [f"{second} is not as it was written: its answers are drawn again"]
    assert second.read_bytes() == body


def test_odd_texts_come_back(tmp_path: Path) -> None:
    """A NUL, half a surrogate pair, a newline."""
    from dataclasses import replace

    class Odd(Counting):
        def sample(self, encoded: EncodedPrompts, **more: Any) -> Rollout:
            found = super().sample(encoded, **more)
            texts = ["\0", "\ud83d", "a\nb", '"'] * len(found.samples)
            return replace(found, samples=[replace(s, text=t) for s, t in zip(found.samples, texts, strict=False)])

    once = portions(tmp_path).sample("a", Odd(), asked(2))
    assert portions(tmp_path).sample("a", Odd(dies=0), asked(2)) == once
