from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
import transformers

from pipeline.flow.errors import UserError
from pipeline.llama import decode, modeling
from pipeline.llama.choosing import truncate
from pipeline.llama.heads import PolicyModel
from pipeline.rollout import native
from pipeline.rollout.engine import SamplingSettings
from pipeline.rollout.native import NativeEngine
from pipeline.rollout.noise import NoiseKey
from pipeline.rollout.scoring import token_logprobs

KEY = NoiseKey(seed=0, row="test")
STOPS = (2, 3, 4)


def new_model(kind: str = "core", vocab: int = 97, spread: float = 0.3, **changes):
    torch.manual_seed(1)
    shape = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": spread,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    names = {
        "core": (modeling.LlamaForCausalLM, transformers.LlamaConfig),
        "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
        "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config),
    }
    model, config = names[kind]
    return model(config(**{**shape, **changes})).eval()


def some_prompts(count: int, vocab: int = 97, longest: int = 20):
    rng = random.Random(0)
    return [[rng.randrange(5, vocab) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def full_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


@pytest.mark.parametrize("kind", ["core", "llama", "qwen2"])
def test_greedy_is_token_for_token_that_of_transformers(kind):
    """T17 too: prompts of mixed lengths in few rows, so that rows are freed, refilled and moved."""
    model = new_model(kind)
    prompts = some_prompts(10)
    engine = NativeEngine(model, STOPS, pad_id=0, rows=4, prefill_tokens=32)
    settings = SamplingSettings(temperature=0, max_new_tokens=12)
    groups = engine.generate(prompts, settings, KEY)
    lengths = set()
    for prompt, (got,) in zip(prompts, groups, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=list(STOPS),
            pad_token_id=0,
        )[0, len(prompt) :]
        assert list(got.ids) == expected.tolist()
        assert got.stopped == (got.ids[-1] in STOPS)
        lengths.add(len(got.ids))
    assert len(lengths) > 1  # some stopped early


OPTIONS = [
    {},
    {"temperature": 0.7},
    {"temperature": 2.0},
    {"top_k": 4},
    {"top_p": 0.8},
    {"min_p": 0.25},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6, "temperature": 1.5},
    {"temperature": 0.7, "top_k": 6, "top_p": 0.9},
    {"top_k": 5, "top_p": 0.95, "min_p": 0.1},
    {"min_new_tokens": 1},
    {
        "min_new_tokens": 1,
        "temperature": 1.3,
        "top_k": 6,
        "top_p": 0.97,
        "min_p": 0.05,
        "repetition_penalty": 1.4,
    },
    {"stop_strings": ("\x06\x03",)},
]


def text_of(answers):
    """Token i is the character i."""
    return ["".join(map(chr, ids)) for ids in answers]


def exact_distribution(logits: np.ndarray, ids: list[int], new: int, s: SamplingSettings, stops) -> np.ndarray:
    """Probabilities of the next token in float64, by the definitions, one token at a time."""
    scores = {t: float(x) for t, x in enumerate(logits)}
    for t in set(ids):
        scores[t] = scores[t] / s.repetition_penalty if scores[t] > 0 else scores[t] * s.repetition_penalty
    left = {t: x / s.temperature for t, x in scores.items() if not (t in stops and new < s.min_new_tokens)}
    ranked = sorted(left, key=lambda t: -left[t])
    if s.top_k:
        ranked = ranked[: s.top_k]
    weights = {t: math.exp(left[t]) for t in ranked}
    total, mass, nucleus = sum(weights.values()), 0.0, []
    for t in ranked:
        if mass / total < s.top_p:
            nucleus.append(t)
        mass += weights[t]
    kept = [t for t in nucleus if weights[t] >= s.min_p * weights[ranked[0]]]
    probs = np.zeros(len(logits))
    for t in kept:
        probs[t] = weights[t] / sum(weights[u] for u in kept)
    return probs


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sampling_frequencies_are_the_exact_distribution(options):
    """Three tokens of a vocabulary of 7: joint frequencies of all answers against exact probabilities."""
    model, prompt, n = new_model(vocab=7, spread=0.5), [5, 6, 1], 4000
    engine = NativeEngine(model, (2,), 0, rows=1000, to_text=text_of)
    settings = SamplingSettings(max_new_tokens=3, samples=n, **options)
    (answers,) = engine.generate([prompt], settings, KEY)
    exact: dict[tuple[int, ...], float] = {}
    ended: set[tuple[int, ...]] = set()

    def walk(ids: tuple[int, ...], p: float) -> None:
        logits = full_logits(model, [*prompt, *ids])[-1].numpy()
        probs = exact_distribution(logits, [*prompt, *ids], len(ids), settings, {2})
        for token in probs.nonzero()[0].tolist():
            longer = (*ids, token)
            stopped = token == 2 or any(x in text_of([longer])[0] for x in settings.stop_strings)
            ended.update({longer} if stopped else ())
            if stopped or len(longer) == 3:
                exact[longer] = p * probs[token]
            else:
                walk(longer, p * probs[token])

    walk((), 1.0)
    counts = dict.fromkeys(exact, 0)
    for g in answers:
        counts[g.ids] += 1  # a KeyError is an answer of probability 0
        assert g.stopped == (g.ids in ended)
    assert math.isclose(sum(exact.values()), 1.0, abs_tol=1e-5)
    rare = [a for a, p in exact.items() if n * p < 5]
    cells = [(counts[a], n * p) for a, p in exact.items() if a not in rare]
    cells += [(sum(counts[a] for a in rare), n * sum(exact[a] for a in rare))] if rare else []
    chi2 = sum((c - e) ** 2 / max(e, 1e-9) for c, e in cells if e > 0)
    free = len(cells) - 1
    assert free > 3
    assert chi2 < free + 4 * math.sqrt(2 * free) + 4
    for g in answers[:50]:
        assert math.exp(sum(g.logprobs)) == pytest.approx(exact[g.ids], rel=1e-4)


EVERY = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    {"repetition_penalty": 1.3, "min_new_tokens": 3},
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"stop_strings": ("A", "\x13\x14", "5")},
    {"temperature": 0.0, "num_beams": 3},
    {"temperature": 0.0, "num_beams": 4, "early_stopping": True, "length_penalty": 0.5, "stop_strings": ("A", "5")},
]


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_samples_do_not_depend_on_the_batch(options):
    """Alone, with others, in another order, in other numbers of rows, and whichever K: the same ids."""
    model, prompts = new_model(), some_prompts(7)
    settings = SamplingSettings(max_new_tokens=8, samples=2, **options)

    def ids(engine, prompts, settings=settings):
        return [[g.ids for g in group] for group in engine.generate(prompts, settings, KEY)]

    def new_engine(**changes):
        return NativeEngine(model, STOPS, 0, to_text=text_of, **changes)

    engine = new_engine()
    together = ids(engine, prompts)
    assert ids(new_engine(rows=3), prompts) == together
    assert ids(new_engine(prefill_tokens=1), prompts) == together
    assert ids(new_engine(cache_bytes=1), prompts[:2]) == together[:2]  # row by row
    assert ids(engine, prompts[::-1]) == together[::-1]
    assert ids(engine, prompts[3:4]) == together[3:4]
    more = ids(engine, prompts, SamplingSettings(max_new_tokens=8, samples=3, **options))
    assert [group[:2] for group in more] == together
    if settings.num_beams == 1:
        longer = ids(engine, prompts, SamplingSettings(max_new_tokens=12, samples=2, **options))
        assert [[a[:8] for a in group] for group in longer] == together
    if settings.temperature or settings.num_beams > 1:
        assert len({a for group in together for a in group}) >= 12


def test_an_answer_ends_with_the_token_that_completes_a_stop_string():
    """Token i is the character i: "23" is the ids 50, 51. The prompt's own text does not count."""
    model, prompts = new_model(spread=0.02), [[50, 51, 50]] * 60
    engine = NativeEngine(model, (2,), 0, to_text=text_of, rows=16)
    plain = engine.generate(prompts, SamplingSettings(max_new_tokens=40), KEY)
    stops = ("23", "W", "!?")
    for (free,), (got,) in zip(
        plain, engine.generate(prompts, SamplingSettings(max_new_tokens=40, stop_strings=stops), KEY), strict=True
    ):
        text = text_of([free.ids])[0]
        ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
        assert got.ids == free.ids[: min(ends, default=40)]
        assert got.stopped == (bool(ends) or free.stopped)
        assert (len(got.logprobs), len(got.raw_logprobs)) == (len(got.ids),) * 2
        assert got.raw_logprobs == pytest.approx(free.raw_logprobs[: len(got.ids)], abs=1e-5)
    with pytest.raises(UserError, match="stop_strings"):
        NativeEngine(model, (2,), 0).generate(prompts, SamplingSettings(stop_strings=("x",)), KEY)


@pytest.mark.parametrize("kind", ["core", "qwen2"])
@pytest.mark.parametrize("options", [{"repetition_penalty": 1.7}, {"min_new_tokens": 6}])
def test_greedy_options_are_those_of_transformers(kind, options):
    model, prompts = new_model(kind), some_prompts(8)
    settings = SamplingSettings(temperature=0, max_new_tokens=12, samples=2, **options)
    groups = NativeEngine(model, STOPS, pad_id=0, rows=5).generate(prompts, settings, KEY)
    plain = NativeEngine(model, STOPS, pad_id=0).generate(
        prompts, SamplingSettings(temperature=0, max_new_tokens=12), KEY
    )
    for prompt, group in zip(prompts, groups, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=list(STOPS),
            pad_token_id=0,
            **options,
        )[0, len(prompt) :].tolist()
        assert [list(g.ids) for g in group] == [expected] * 2
    assert [group[0].ids for group in groups] != [group[0].ids for group in plain]  # the option does something


def test_names_say_which_prompt_is_which():
    model, prompt = new_model(), [9, 8, 7]
    engine, settings = NativeEngine(model, STOPS, 0), SamplingSettings(max_new_tokens=8)
    by_content = engine.generate([prompt, prompt], settings, KEY)
    assert by_content[0][0].ids != by_content[1][0].ids
    a, b = engine.generate([prompt, prompt], settings, KEY, names=["a", "b"])
    assert engine.generate([prompt], settings, KEY, names=["b"])[0][0].ids == b[0].ids != a[0].ids
    next_iteration = NoiseKey(0, "test", 1)
    assert engine.generate([prompt], settings, next_iteration, names=["b"])[0][0].ids != b[0].ids


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_full_forward(temperature):
    """T34, T33: recomputed by the forest in train mode with dropout in the config, both distributions."""
    model = new_model(attention_dropout=0.1).train()
    prompts = some_prompts(10)
    engine = NativeEngine(model, STOPS, 0, rows=8)
    settings = SamplingSettings(temperature=temperature, max_new_tokens=12, samples=3)
    groups = engine.generate(prompts, settings, KEY)
    assert model.training
    answers = [(p, [g.ids for g in group]) for p, group in zip(prompts, groups, strict=True)]
    for field, t in (("logprobs", temperature), ("raw_logprobs", 1.0)):
        again = token_logprobs(PolicyModel(model), answers, temperature=t, token_budget=200)
        for group, own in zip(groups, again, strict=True):
            for g, logprobs in zip(group, own, strict=True):
                stored = torch.tensor(getattr(g, field))
                torch.testing.assert_close(logprobs, stored, atol=1e-5, rtol=1e-5)


def test_truncated_logprobs_are_of_the_truncated_distribution():
    model, prompt = new_model(), [9, 8, 7]
    settings = SamplingSettings(top_p=0.6, temperature=0.8, max_new_tokens=6, min_new_tokens=2)
    ((got,),) = NativeEngine(model, STOPS, 0).generate([prompt], settings, KEY)
    ids = prompt + list(got.ids)
    for i, token in enumerate(got.ids):
        logits = full_logits(model, ids[: len(prompt) + i])[-1:]
        raw = torch.log_softmax(logits, -1)[0, token].item()
        if i < 2:
            logits[:, list(STOPS)] = -math.inf
        own = torch.log_softmax(truncate(logits / 0.8, 0, 0.6), -1)[0, token].item()
        assert got.raw_logprobs[i] == pytest.approx(raw, abs=1e-5)
        assert got.logprobs[i] == pytest.approx(own, abs=1e-5)


def test_answers_end_with_their_stop_token_or_at_the_limit():
    model, prompts = new_model(spread=0.02), some_prompts(40)
    engine = NativeEngine(model, range(2, 20), 0, rows=16)
    groups = engine.generate(prompts, SamplingSettings(max_new_tokens=6, min_new_tokens=2, samples=2), KEY)
    answers = [g for group in groups for g in group]
    assert [(g.prompt, g.index) for g in answers] == [(p, k) for p in range(40) for k in range(2)]
    for g in answers:
        stops = [i for i in g.ids if 2 <= i < 20]
        assert len(g.ids) == len(g.logprobs) == len(g.raw_logprobs) <= 6
        assert len(stops) == g.stopped and (not stops or g.ids[-1] == stops[0])
        assert g.stopped or len(g.ids) == 6
        assert not g.stopped or len(g.ids) >= 3  # two others before it
    assert {g.stopped for g in answers} == {True, False}


def test_a_prompt_is_computed_once_for_all_its_samples():
    model, prompts = new_model(), some_prompts(6)
    engine = NativeEngine(model, (), 0)
    fed = []
    plain = decode.LayerRunner.prefill

    def watch(self, ids_PT, lengths_P, slots_PK):
        fed.append((lengths_P.tolist(), tuple(slots_PK.shape)))
        return plain(self, ids_PT, lengths_P, slots_PK)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode.LayerRunner, "prefill", watch)
        engine.generate(prompts, SamplingSettings(max_new_tokens=5, samples=8), KEY)
    assert fed == [(sorted(map(len, prompts), reverse=True), (6, 8))]
    assert engine.usage.prompt_tokens == sum(map(len, prompts))
    assert engine.usage.new_tokens == 6 * 8 * 5
    assert engine.usage.steps == 4  # the first token comes from the prompt


def test_one_token_at_most_and_nothing_to_do():
    model = new_model()
    engine = NativeEngine(model, STOPS, 0)
    assert engine.generate([], SamplingSettings(), KEY) == []
    groups = engine.generate(some_prompts(5), SamplingSettings(max_new_tokens=1, samples=2), KEY)
    assert [[len(g.ids) for g in group] for group in groups] == [[1, 1]] * 5
    assert engine.usage.steps == 0


def test_prompts_that_cannot_be_answered_are_refused():
    engine = NativeEngine(new_model(), STOPS, 0)
    with pytest.raises(UserError, match="without tokens"):
        engine.generate([[5], []], SamplingSettings(), KEY)
    with pytest.raises(UserError, match=r"need 129 positions, the model has 128: lower"):
        engine.generate([[5] * 81], SamplingSettings(max_new_tokens=48), KEY)


def test_dynamic_positions_go_on_beyond_the_trained_length():
    """What is drawn has the log-probs of the whole row under the same model."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = new_model(rope_parameters=rope, max_position_embeddings=16)
    (group,) = NativeEngine(model, STOPS, 0).generate([list(range(5, 25))], SamplingSettings(max_new_tokens=12), KEY)
    ids = torch.tensor([[*range(5, 25), *group[0].ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, 19:-1].log_softmax(-1)
    same = logits.gather(1, ids[0, 20:, None]).squeeze(1)
    assert (torch.tensor(group[0].logprobs) - same).abs().max() <= 1e-5


def test_the_cache_is_kept_and_given_back():
    model, settings = new_model(), SamplingSettings(max_new_tokens=8)
    engine = NativeEngine(model, STOPS, 0)
    first = engine.generate(some_prompts(8), settings, KEY)
    cache = engine._cache
    engine.generate(some_prompts(3, longest=5), settings, KEY)
    assert engine._cache is cache
    assert engine.generate(some_prompts(8), settings, KEY) == first  # what an earlier call left does no harm
    engine.generate(some_prompts(3, longest=40), settings, KEY)
    assert engine._cache is not cache
    engine.release()
    assert engine._cache is None


def test_progress_is_told_and_ends_at_the_total(monkeypatch):
    monkeypatch.setattr(native, "SECONDS_BETWEEN_REPORTS", 0.0)
    told: list[tuple[int, int]] = []
    engine = NativeEngine(new_model(), STOPS, 0, rows=4)
    settings = SamplingSettings(max_new_tokens=6, samples=2)
    engine.generate(some_prompts(9), settings, KEY, lambda done, total: told.append((done, total)))
    assert told[-1] == (18, 18) and len(told) > 2
    assert told == sorted(told)


def test_weights_are_read_anew_at_every_call():
    model, prompts = new_model(), some_prompts(4)
    engine, settings = NativeEngine(model, STOPS, 0), SamplingSettings(max_new_tokens=8)
    before = engine.generate(prompts, settings, KEY)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(-3.0)
    assert engine.generate(prompts, settings, KEY) != before
    assert engine.generate(prompts, settings, KEY) == NativeEngine(model, STOPS, 0).generate(prompts, settings, KEY)
