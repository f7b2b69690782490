"""The parts of the vLLM engine that run without vLLM: what trl is told, what it is sent, what is made of its answers.

trl's own `VLLMGeneration` takes part (its sync_weights and generate); in place of vLLM's LLM stands a recorder.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from safetensors.torch import load_file

from pipeline.flow.errors import NonFinite, UserError
from pipeline.rollout import vllm
from pipeline.rollout.engine import EngineSettings, SamplingSettings
from pipeline.rollout.noise import NoiseKey
from tests.rollout.test_contract import new_tokenizer, text_of
from tests.rollout.test_native import full_logits, new_model
from tests.small import policy

peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl.generation.vllm_generation")
KEY = NoiseKey(seed=0, row="test")


class Recorder:
    """What of vLLM's LLM trl calls. Answers every prompt with the ids and log-probs it is given."""

    def __init__(self, answers=(), fail=False):
        self.answers, self.loaded, self.asked, self.fail = list(answers), {}, [], fail
        runner = SimpleNamespace(model=self)
        worker = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def load_weights(self, pairs):
        if self.fail and len(self.loaded) == 3:
            raise RuntimeError("out of memory")
        self.loaded |= {name: weight.detach().clone() for name, weight in pairs}

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, sampling_params, use_tqdm):
        self.asked.append(([p["prompt_token_ids"] for p in prompts], sampling_params))
        out = []
        for prompt in prompts:
            ids, logprobs = self.answers.pop(0)
            lines = [{i: SimpleNamespace(rank=1, logprob=x)} for i, x in zip(ids, logprobs, strict=True)]
            answer = SimpleNamespace(token_ids=ids, logprobs=lines)
            out.append(SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[answer]))
        return out


def new_engine(monkeypatch, model, recorder, stop_ids=(2, 3), settings=None):
    def start(model, tokenizer, settings, accelerator):
        generation = trl.VLLMGeneration.__new__(trl.VLLMGeneration)  # without starting vLLM
        generation.model, generation.accelerator = model, accelerator
        generation._dist = trl.DistributedBackend(accelerator)
        generation.mode, generation.enable_sleep_mode, generation.tensor_parallel_size = "colocate", False, 1
        generation.structured_outputs_regex, generation.llm = None, recorder
        return generation

    monkeypatch.setattr(vllm, "require_vllm", lambda: None)
    monkeypatch.setattr(vllm, "start", start)
    monkeypatch.setattr(trl, "SamplingParams", lambda **options: options, raising=False)
    settings = settings or EngineSettings(engine="vllm")
    return vllm.VllmEngine(
        model, stop_ids, None, settings, to_text=text_of, accelerator=accelerate.Accelerator(cpu=True)
    )


def test_answers_and_where_they_end(monkeypatch):
    """Two prompts, two samples: a stop token, the limit, a stop string (token 40) at the limit, one before it."""
    drawn = [([7, 2], [-0.5, -1.0]), ([7, 8, 9], [-1.0] * 3), ([7, 8, 40], [-2.0] * 3), ([40], [-3.0])]
    recorder = Recorder(drawn)
    engine = new_engine(monkeypatch, new_model(), recorder)
    settings = SamplingSettings(max_new_tokens=3, samples=2, stop_strings=(chr(0x100 + 40),))
    groups = engine.generate([[5, 6], [7]], settings, KEY)
    flat = [g for group in groups for g in group]
    assert [(g.prompt, g.index, g.stopped) for g in flat] == [(0, 0, True), (0, 1, False), (1, 0, True), (1, 1, True)]
    assert (
        [(list(g.ids), list(g.logprobs)) for g in flat] == drawn == [(list(g.ids), list(g.raw_logprobs)) for g in flat]
    )
    ((prompts, asked),) = recorder.asked
    assert prompts == [[5, 6], [5, 6], [7], [7]]
    assert asked["stop"] == [chr(0x100 + 40)] and asked["include_stop_str_in_output"]
    assert (engine.usage.prompt_tokens, engine.usage.new_tokens) == (3, 9)


def test_every_option_is_told(monkeypatch):
    recorder = Recorder([([7, 2], [-0.5, -1.0])])
    engine = new_engine(monkeypatch, new_model(), recorder)
    settings = SamplingSettings(
        temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2, max_new_tokens=9, min_new_tokens=1
    )
    ((got,),) = engine.generate([[5]], settings, KEY)
    ((_, asked),) = recorder.asked
    assert asked == {
        "n": 1, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2,
        "max_tokens": 9, "min_tokens": 1, "logprobs": 0, "stop_token_ids": [2, 3], "ignore_eos": True,
    }  # fmt: skip
    assert got.logprobs == (-0.5, -1.0)
    raw = [torch.log_softmax(full_logits(engine.model, ids)[-1], -1)[t].item() for ids, t in (([5], 7), ([5, 7], 2))]
    assert got.raw_logprobs == pytest.approx(raw, abs=1e-5)


def test_what_vllm_does_not_have_is_refused(monkeypatch):
    engine = new_engine(monkeypatch, new_model(), Recorder([([7], [math.nan])]))
    with pytest.raises(UserError, match=r"num_beams 2.*native"):
        engine.generate([[5]], SamplingSettings(temperature=0, num_beams=2), KEY)
    with pytest.raises(NonFinite, match="prompt 0, sample 0"):
        engine.generate([[5]], SamplingSettings(), KEY)
    with pytest.raises(UserError, match="beyond plain LLaMA; set engine: native"):
        new_engine(monkeypatch, policy(num_local_experts=4).model, Recorder())


def adapted(model, **changes):
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **changes)
    return peft.get_peft_model(model, lora)


@pytest.mark.parametrize("fail", [False, True])
def test_merged_weights_are_sent_and_the_base_is_put_back_bit_for_bit(monkeypatch, fail):
    """trl merges and unmerges, which alone leaves W + BA - BA; after an error halfway it leaves them merged."""
    plain = new_model()
    model = adapted(copy.deepcopy(plain)).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    recorder = Recorder([([2], [-1.0])] * 9, fail)
    engine = new_engine(monkeypatch, model, recorder)
    for _ in range(3):
        if fail:
            with pytest.raises(RuntimeError, match="out of memory"):
                engine.generate([[5]], SamplingSettings(), KEY)
            recorder.loaded.clear()
        else:
            engine.generate([[5]], SamplingSettings(), KEY)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(getattr(m, "merged", False) for m in model.modules())
    if not fail:
        assert set(recorder.loaded) == {n for n, _ in plain.named_parameters()}
        name = "model.layers.1.mlp.down_proj"
        a, b = (before[f"base_model.model.{name}.lora_{x}.default.weight"] for x in "AB")
        scale = model.peft_config["default"].lora_alpha / 4
        expected = before[f"base_model.model.{name}.base_layer.weight"] + scale * b @ a
        torch.testing.assert_close(recorder.loaded[f"{name}.weight"], expected)


def test_unmerging_alone_leaves_rounding_errors():
    """Why the weights are kept: the same without `base_weights_kept`."""
    model = adapted(new_model())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(3):
        model.merge_adapter()
        model.unmerge_adapter()
    assert not all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("with_adapter", [False, True])
def test_vllm_gets_a_directory_to_open(with_adapter):
    """Config, tokenizer and weights under plain names, there for as long as vLLM reads it."""
    plain = new_model(tie_word_embeddings=True)
    model = adapted(copy.deepcopy(plain)) if with_adapter else plain
    before = model.name_or_path
    with vllm._openable(model, new_tokenizer(), needed=True):
        directory = Path(model.name_or_path)
        weights = load_file(directory / "model.safetensors")
        assert {"config.json", "tokenizer.json"} <= {p.name for p in directory.iterdir()}
        assert {n: tuple(w.shape) for n, w in weights.items()} == {
            n: tuple(p.shape) for n, p in plain.named_parameters()
        }
        with vllm._openable(model, new_tokenizer(), needed=True):
            assert Path(model.name_or_path) == directory  # it has one
    assert model.name_or_path == before and not directory.exists()


def test_ranks_bring_as_many_prompts_as_the_one_with_most(monkeypatch):
    engine = new_engine(monkeypatch, new_model(), Recorder())
    engine._accelerator = SimpleNamespace(num_processes=3)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [5, *own, 4])
    assert engine._filling(2) == [[2]] * 3
    assert engine._filling(5) == []
