"""A ladder of temperatures: one sampler a rung, numbered through, each with noise of its own."""

from __future__ import annotations

from typing import Any

from pipeline.data.records import Origin
from pipeline.rollout.collect import Sampler, encode_prompts
from pipeline.rollout.draw import draw
from pipeline.rollout.engine import SamplingSettings
from pipeline.rollout.noise import NoiseKey
from tests.small import chat, policy, prompts

ORIGIN = Origin("p", "tok", "tem", row="rejection", seed=5, iteration=2)
SETTINGS = SamplingSettings(samples=2, max_new_tokens=6, temperature=0.9)


def asked() -> Any:
    return encode_prompts(prompts("a", "bb", "ccc"), chat(), 99, 9)


def test_without_a_ladder_it_is_one_sampler_of_that_row_and_iteration() -> None:
    role = policy()
    found = draw(role.model, chat(), asked(), SETTINGS, ORIGIN)
    plain = Sampler(role.model, chat(), SETTINGS, NoiseKey(5, "rejection")).sample(asked(), iteration=2).samples
    assert [(s.prompt.id, s.index, s.ids) for s in found] == [(s.prompt.id, s.index, s.ids) for s in plain]
    assert {s.origin for s in found} == {Origin("p", "tok", "tem", "rejection", 5, 2, 0.9)}


def test_rungs_are_numbered_through_and_keep_their_temperature() -> None:
    found = draw(policy().model, chat(), asked(), SETTINGS, ORIGIN, temperatures=(0.5, 1.0, 1.5))
    assert [(s.prompt.id, s.index) for s in found] == [(f"p{i}", k) for i in range(3) for k in range(6)]
    assert [s.origin.temperature for s in found[:6] if s.origin] == [0.5, 0.5, 1.0, 1.0, 1.5, 1.5]
    assert [s.cost.prompt for s in found[:6] if s.cost] == [5, 0, 5, 0, 5, 0]  # every rung computes the prompt again


def test_rungs_draw_from_noise_of_their_own() -> None:
    """At nearly equal temperatures the same noise would draw the same answers."""
    found = draw(policy().model, chat(), asked(), SETTINGS, ORIGIN, temperatures=(1.0, 1.0001))
    for i in range(3):
        low, high = found[4 * i : 4 * i + 2], found[4 * i + 2 : 4 * i + 4]
        assert [s.ids for s in low] != [s.ids for s in high]


def test_a_rung_does_not_depend_on_the_others() -> None:
    role = policy()
    one = draw(role.model, chat(), asked(), SETTINGS, ORIGIN, temperatures=(1.5,))
    many = draw(role.model, chat(), asked(), SETTINGS, ORIGIN, temperatures=(0.5, 1.5))
    assert [s.ids for s in one] == [s.ids for s in many if s.origin and s.origin.temperature == 1.5]


def test_permuting_prompts_permutes_samples() -> None:
    """T48."""
    role, order = policy(), [2, 0, 1]
    straight = draw(role.model, chat(), asked(), SETTINGS, ORIGIN, temperatures=(0.5, 1.5))
    shuffled = draw(role.model, chat(), asked().take(order), SETTINGS, ORIGIN, temperatures=(0.5, 1.5))
    by_place = [straight[4 * i + k] for i in order for k in range(4)]
    assert [(s.prompt.id, s.index, s.ids) for s in shuffled] == [(s.prompt.id, s.index, s.ids) for s in by_place]
