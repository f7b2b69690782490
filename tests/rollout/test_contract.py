"""What every engine promises, whichever it is: see `pipeline.rollout.engine.Engine`."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pipeline.flow.errors import UserError
from pipeline.llama.heads import PolicyModel
from pipeline.rollout.engine import EngineSettings, SamplingSettings, new_engine
from pipeline.rollout.noise import NoiseKey
from pipeline.rollout.scoring import token_logprobs
from tests.rollout.test_native import STOPS, new_model, some_prompts

KEY = NoiseKey(seed=0, row="test")
NO_VLLM = importlib.util.find_spec("vllm") is None or not torch.cuda.is_available()
ENGINES = [
    "native",
    pytest.param("vllm", marks=pytest.mark.skipif(NO_VLLM, reason="needs vLLM and a GPU")),
]
NEAR = {"native": 1e-5, "vllm": 0.1}  # of log-probs to the trainer's; half precision where vLLM runs


def new_tokenizer():
    """Token i is the i-th character from U+0100 on."""
    vocabulary = {chr(0x100 + i): i for i in range(97)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="\u0100")), unk_token="\u0100"
    )


def text_of(answers):
    return ["".join(chr(0x100 + i) for i in ids) for ids in answers]


@pytest.fixture(scope="module")
def model():
    model = new_model(spread=0.1)
    return model.to("cuda", torch.bfloat16) if not NO_VLLM else model


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, model):
    settings = EngineSettings(engine=request.param)
    made = new_engine(settings, model, STOPS, 0, to_text=text_of, tokenizer=new_tokenizer())
    made.name = request.param
    yield made
    made.release()


OPTIONS = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.0},
    {"top_k": 10, "top_p": 0.9, "min_p": 0.01},
    {"repetition_penalty": 1.3},
    {"min_new_tokens": 4},
    {"stop_strings": ("\u0120", "\u0130\u0131", "\u0140")},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_answers_have_the_form_that_is_promised(engine, model, options):
    """Order, number, alignment, where an answer ends, and that raw log-probs are those of the policy."""
    prompts = some_prompts(6)
    settings = SamplingSettings(max_new_tokens=10, samples=3, **options)
    before = engine.usage.new_tokens
    groups = engine.generate(prompts, settings, KEY)
    assert [[(g.prompt, g.index) for g in group] for group in groups] == [[(p, k) for k in range(3)] for p in range(6)]
    again = token_logprobs(
        PolicyModel(model), [(p, [g.ids for g in gs]) for p, gs in zip(prompts, groups, strict=True)]
    )
    for group, own in zip(groups, again, strict=True):
        for g, raw in zip(group, own, strict=True):
            assert 1 <= len(g.ids) == len(g.logprobs) == len(g.raw_logprobs) <= 10
            assert all(0 <= i < 97 for i in g.ids)
            assert not any(i in STOPS for i in g.ids[:-1])
            said = [any(x in text_of([g.ids[:n]])[0] for x in settings.stop_strings) for n in range(len(g.ids) + 1)]
            assert not any(said[:-1])
            assert g.stopped == (g.ids[-1] in STOPS or said[-1])
            assert g.stopped or len(g.ids) == 10
            assert not (g.ids[-1] in STOPS and len(g.ids) <= settings.min_new_tokens)
            torch.testing.assert_close(torch.tensor(g.raw_logprobs), raw, atol=NEAR[engine.name], rtol=0)
            if settings.temperature == 0:
                assert set(g.logprobs) == {0.0}
            elif options == {}:
                assert g.logprobs == g.raw_logprobs
    assert engine.usage.new_tokens - before == sum(len(g.ids) for group in groups for g in group)
    if settings.temperature:
        assert len({g.ids for group in groups for g in group}) > 6
    else:
        assert all(len({g.ids for g in group}) == 1 for group in groups)


def test_weights_are_those_of_the_call(engine, model):
    """Greedy answers follow the head: with every row but token 9's at zero and the embeddings positive, 9 wins."""
    prompts, settings = some_prompts(3), SamplingSettings(temperature=0, max_new_tokens=4)
    before = engine.generate(prompts, settings, KEY)
    kept = model.lm_head.weight.detach().clone()
    try:
        with torch.no_grad():
            model.lm_head.weight[9] = 20 * model.lm_head.weight[9].abs().max() * torch.ones_like(kept[9])
            model.lm_head.weight[10] = -model.lm_head.weight[9]
        for (answer,) in engine.generate(prompts, settings, KEY):
            assert set(answer.ids) <= {9, 10}
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(kept)
    assert [g[0].ids for g in engine.generate(prompts, settings, KEY)] == [g[0].ids for g in before]


def test_what_cannot_be_answered_is_refused(engine):
    told = []
    assert engine.generate([], SamplingSettings(), KEY) == []
    with pytest.raises(UserError, match="without tokens"):
        engine.generate([[5], []], SamplingSettings(), KEY)
    with pytest.raises(UserError, match=r"need 129 positions, the model has 128: lower"):
        engine.generate([[5] * 81], SamplingSettings(max_new_tokens=48), KEY)
    engine.generate([[5, 6]], SamplingSettings(max_new_tokens=3, samples=2), KEY, lambda *x: told.append(x))
    assert told[-1] == (2, 2)
