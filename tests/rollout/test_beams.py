from __future__ import annotations

import math

import pytest
import torch

from pipeline.rollout.engine import SamplingSettings
from pipeline.rollout.native import NativeEngine
from pipeline.rollout.noise import NoiseKey
from tests.rollout.test_native import STOPS, full_logits, new_model, some_prompts, text_of

KEY = NoiseKey(seed=0, row="test")

SEARCHES = [
    {"num_beams": 4},
    {"num_beams": 3, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 3, "length_penalty": -1.0},
    {"num_beams": 2, "length_penalty": 0.0, "early_stopping": "never"},
    {"num_beams": 5, "early_stopping": True},
    {"num_beams": 4, "repetition_penalty": 1.5, "min_new_tokens": 4},
]


@pytest.mark.parametrize("kind", ["core", "qwen2"])
@pytest.mark.parametrize("options", SEARCHES, ids=str)
def test_the_beams_are_those_of_transformers(kind, options):
    """Every beam, in order: prompts of mixed lengths in few rows, so that prompts are done at different steps."""
    model, prompts, beams = new_model(kind, spread=0.15), some_prompts(6), options["num_beams"]
    engine = NativeEngine(model, STOPS, pad_id=0, rows=12, prefill_tokens=64)
    settings = SamplingSettings(temperature=0, max_new_tokens=10, samples=beams, **options)
    groups = engine.generate(prompts, settings, KEY)
    stopped = set()
    for prompt, group in zip(prompts, groups, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=10,
            num_return_sequences=beams,
            eos_token_id=list(STOPS),
            pad_token_id=96,
            **options,
        )[:, len(prompt) :].tolist()
        assert [g.index for g in group] == list(range(beams))
        for got, line in zip(group, expected, strict=True):
            assert [*got.ids, *[96] * (len(line) - len(got.ids))] == line
            assert got.stopped == (got.ids[-1] in STOPS)
            stopped.add(got.stopped)
    assert stopped == {True, False} or options.get("length_penalty", 1) != 1 or "min_new_tokens" in options


def test_a_wide_beam_finds_the_best_answer_of_all():
    """All 6 + 6**2 + 6**3 + 6**4 answers of a vocabulary of 7 (token 2 ends) scored one by one; length_penalty 0."""
    model, prompt = new_model(vocab=7, spread=0.5), [5, 6, 1]
    scores: dict[tuple[int, ...], float] = {}

    def walk(ids: tuple[int, ...], total: float) -> None:
        logprobs = torch.log_softmax(full_logits(model, [*prompt, *ids])[-1], -1).tolist()
        for token, x in enumerate(logprobs):
            longer = (*ids, token)
            if token == 2 or len(longer) == 4:
                scores[longer] = total + x
            else:
                walk(longer, total + x)

    walk((), 0.0)
    best = sorted(scores, key=lambda ids: -scores[ids])[:5]
    settings = SamplingSettings(
        temperature=0, num_beams=300, samples=5, max_new_tokens=4, length_penalty=0.0, early_stopping="never"
    )
    (answers,) = NativeEngine(model, (2,), 0).generate([prompt], settings, KEY)
    assert [g.ids for g in answers] == best
    for g in answers:
        assert sum(g.raw_logprobs) == pytest.approx(scores[g.ids], abs=1e-4)
        assert set(g.logprobs) == {0.0} and len(g.logprobs) == len(g.ids)


def test_beams_end_at_stop_strings_and_are_counted():
    model, prompts = new_model(spread=0.1), some_prompts(5)
    engine = NativeEngine(model, (), 0, to_text=text_of, rows=8)
    settings = SamplingSettings(temperature=0, num_beams=4, samples=2, max_new_tokens=9, length_penalty=-2.0)
    free = engine.generate(prompts, settings, KEY)
    told: list[tuple[int, int]] = []
    stops = tuple({chr(group[0].ids[2]) for group in free})
    with_stops = settings.model_copy(update={"stop_strings": stops})
    engine = NativeEngine(model, (), 0, to_text=text_of, rows=8)
    groups = engine.generate(prompts, with_stops, KEY, lambda done, total: told.append((done, total)))
    assert told == [(2 * n, 10) for n in range(1, 6)]
    answers = [g for group in groups for g in group]
    assert any(g.stopped for g in answers)
    for g in answers:
        text = text_of([g.ids])[0]
        assert g.stopped == any(stop in text for stop in stops)
        assert not any(stop in text[:-1] for stop in stops)
        assert math.isfinite(sum(g.raw_logprobs))
    assert engine.usage.new_tokens == sum(len(g.ids) for g in answers)
    assert engine.usage.prompt_tokens == sum(map(len, prompts))


def test_rows_hold_at_least_one_prompts_beams():
    model, prompts = new_model(), some_prompts(3)
    settings = SamplingSettings(temperature=0, num_beams=5, max_new_tokens=6)
    expected = NativeEngine(model, STOPS, 0).generate(prompts, settings, KEY)
    got = NativeEngine(model, STOPS, 0, rows=2, cache_bytes=1).generate(prompts, settings, KEY)
    assert [g.ids for group in got for g in group] == [g.ids for group in expected for g in group]
