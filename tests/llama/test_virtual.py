"""Virtual tokens: hidden states, scores and cached decoding against peft's own forward, path by path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from pipeline.data.forest import Segment, build
from pipeline.flow.errors import UserError
from pipeline.llama import adapters, decode, virtual
from pipeline.llama.adapter_settings import (
    AnyAdapter,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
)
from pipeline.llama.heads import PolicyModel, ScalarModel, hidden_states
from pipeline.llama.modeling import LlamaForCausalLM, LlamaForSequenceClassification
from pipeline.llama.presets import PRESETS
from pipeline.rollout.engine import SamplingSettings
from pipeline.rollout.native import NativeEngine
from pipeline.rollout.noise import NoiseKey
from pipeline.train.loop import enable_checkpointing
from tests import small
from tests.architectures import CASES

SHAPE: dict[str, Any] = {**PRESETS["test"], "initializer_range": 0.1}
PROMPT, ANSWERS = [5, 6, 7, 8], [[9, 10], [11], [12, 13, 14]]
FOREST = build([[Segment(PROMPT, weights=[1.0] * 4), *(Segment(a, 0, weights=[1.0] * len(a)) for a in ANSWERS)]])
PATHS = [PROMPT + answer for answer in ANSWERS]
KINDS: dict[str, AnyAdapter] = {
    "prefix": PrefixSettings(kind="prefix", tokens=3),
    "projection": PrefixSettings(kind="prefix", tokens=3, projection=8),
    "prompt": PromptSettings(kind="prompt", tokens=3),
    "mlp": PTuningSettings(kind="p_tuning", tokens=3, hidden=8),
    "lstm": PTuningSettings(kind="p_tuning", tokens=3, hidden=8, encoder="lstm"),
}


def adapted(settings: AnyAdapter, family: str = "core", **changes: Any) -> Any:
    """A policy or classifier with virtual tokens that matter."""
    torch.manual_seed(0)
    shape = {**SHAPE, **changes}
    if family == "qwen2":
        model: Any = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape))
    elif family == "scores":
        model = LlamaForSequenceClassification(transformers.LlamaConfig(**shape, num_labels=1))
    else:
        model = LlamaForCausalLM(transformers.LlamaConfig(**shape))
    made = adapters.add_adapter(model.eval(), settings, seed=0).eval()
    with torch.no_grad():
        for p in made.prompt_encoder.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made


def peft_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """peft's own forward of one text: [T, V]."""
    row = torch.tensor([ids])
    with torch.no_grad():
        return model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, -len(ids) :]


@pytest.mark.parametrize("family", ["core", "qwen2"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_forest_computes_what_peft_does_for_every_path(kind: str, family: str) -> None:
    model = adapted(KINDS[kind], family)
    found = PolicyModel(model)(FOREST).logprobs_T
    start = int(FOREST.start_S[0])
    for path, at in zip(PATHS, FOREST.start_S[1:].tolist(), strict=True):
        logp = peft_logits(model, path).log_softmax(-1)[:-1].gather(1, torch.tensor(path)[1:, None])[:, 0]
        assert (found[start + 1 : start + 4] - logp[:3]).abs().max() <= 1e-5
        assert (found[at : at + len(path) - 4] - logp[3:]).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="virtual tokens"):
        hidden_states(model, FOREST, padded=False)
    assert (found - PolicyModel(model.get_base_model())(FOREST).logprobs_T).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_pefts(kind: str) -> None:
    model = adapted(KINDS[kind])
    chain = build([[Segment(PATHS[0], weights=[1.0] * 6)]])
    (-PolicyModel(model)(chain).logprobs_T.sum()).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    row = torch.tensor([PATHS[0]])
    logits = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, -6:]
    torch.nn.functional.cross_entropy(logits[:-1], row[0, 1:], reduction="sum").backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(ours[name], p.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_stand_at_every_token(kind: str) -> None:
    model = adapted(KINDS[kind], "scores")
    found = ScalarModel(model)(FOREST)
    for path, last in zip(PATHS, FOREST.last_S[1:].tolist(), strict=True):
        row = torch.tensor([path])
        assert (model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, 0] - found[last]).abs() <= 1e-5


@pytest.mark.parametrize("family", ["core", "qwen2"])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_decoding_is_the_full_forward(kind: str, family: str) -> None:
    """Prompts of several lengths, two samples each, steps, and rows moved in between (T52)."""
    model = adapted(KINDS[kind], family)
    prompts = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
    ids = torch.tensor([p + [0] * (5 - len(p)) for p in prompts])
    lengths, slots = torch.tensor([5, 1, 3]), torch.tensor([[0, 3], [1, 4], [2, 5]])
    cache = decode.new_cache(model, 6, 12)
    runner = decode.new_runner(model, cache)
    assert isinstance(runner, decode.VirtualRunner) and cache.before == 3
    texts = [prompts[row % 3] for row in range(6)]
    with torch.no_grad():
        for row, logits in enumerate(runner.prefill(ids, lengths, slots)):
            torch.testing.assert_close(logits, peft_logits(model, texts[row])[-1], atol=1e-5, rtol=1e-5)
        for step in range(3):
            if step == 2:  # row 5 takes the place of row 1
                cache.move(torch.tensor([5]), torch.tensor([1]), max(map(len, texts)))
                texts[1] = list(texts[5])
            positions = torch.tensor([len(text) for text in texts])
            texts = [[*text, 20 + 3 * row + step] for row, text in enumerate(texts)]
            tokens = torch.tensor([text[-1] for text in texts])
            found = runner.step(tokens, positions, int(positions.max()) + 1)
            for logits, text in zip(found, texts, strict=True):
                torch.testing.assert_close(logits, peft_logits(model, text)[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if not CASES[case].get("prefix_attention")])
def test_every_architecture_takes_them(case: str) -> None:
    """But for latent attention with prefixes, and for what does not know of tokens before a text: those are refused."""
    shape = SHAPES[case]
    hiding = shape.get("sliding_window") or shape.get("prefix_attention")
    for kind in ("prefix", "prompt"):
        if hiding or (kind == "prefix" and shape.get("attention") == "latent"):
            with pytest.raises(UserError, match=f"adapter.kind: {kind} (puts tokens|changes keys)"):
                adapters.add_adapter(small.policy(**shape).model, KINDS[kind], seed=0)
            continue
        model = adapters.add_adapter(small.policy(spread=0.2, **SHAPES[case]).model, KINDS[kind], seed=0).eval()
        runner = decode.new_runner(model, decode.new_cache(model, 3, 10))
        ids = torch.tensor([path[:5] for path in PATHS])
        with torch.no_grad():
            found = PolicyModel(model)(FOREST).logprobs_T
            runner.prefill(ids, torch.tensor([5, 4, 5]), torch.arange(3)[:, None])
            stepped = runner.step(torch.tensor([20, 21, 22]), torch.tensor([5, 4, 5]), 6)
        for row, (path, at) in enumerate(zip(PATHS, FOREST.start_S[1:].tolist(), strict=True)):
            logp = peft_logits(model, path).log_softmax(-1)[:-1].gather(1, torch.tensor(path)[1:, None])[:, 0]
            assert (found[at : at + len(path) - 4] - logp[3:]).abs().max() <= 1e-5
            text = [*path[: (5, 4, 5)[row]], 20 + row]
            torch.testing.assert_close(stepped[row], peft_logits(model, text)[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("beams", [1, 3])
def test_the_engine_draws_what_peft_would(kind: str, beams: int) -> None:
    """Greedy answers and beams, rows refilled and closed up on the way."""
    model = adapted(KINDS[kind], initializer_range=0.3)
    prompts = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [14, 15]]
    settings = SamplingSettings(temperature=0, max_new_tokens=6, num_beams=beams)
    engine = NativeEngine(model, stop_ids=(3,), pad_id=0, rows=2 if beams == 1 else 8)
    found = engine.generate(prompts, settings, NoiseKey(0, "t"))
    for prompt, (answer,) in zip(prompts, found, strict=True):
        if beams == 1:
            text = list(prompt)
            for token, logprob in zip(answer.ids, answer.raw_logprobs, strict=True):
                logp = peft_logits(model, text)[-1].log_softmax(-1)
                assert token == int(logp.argmax()) and abs(float(logp[token]) - logprob) <= 1e-5
                text.append(token)
        else:
            row = torch.tensor([prompt])
            with torch.no_grad():
                theirs = model.generate(
                    input_ids=row, attention_mask=torch.ones_like(row), num_beams=beams, do_sample=False,
                    max_new_tokens=6, eos_token_id=3, pad_token_id=0,
                )  # fmt: skip
            expected = [t for t in theirs[0, len(prompt) :].tolist() if t != 0]
            assert list(answer.ids) == expected


def test_lower_precision_is_close() -> None:
    for kind in ("prefix", "prompt"):
        model, ids = adapted(KINDS[kind]), torch.tensor([[5, 6, 7]])
        runner = decode.new_runner(model, decode.new_cache(model, 1, 10), torch.bfloat16)
        with torch.no_grad():
            found = [runner.prefill(ids, torch.tensor([3]), torch.tensor([[0]]))[0]]
            found.append(runner.step(torch.tensor([8]), torch.tensor([3]), 4)[0])
        expected = peft_logits(model, [5, 6, 7, 8])[-2:]
        assert (torch.stack(found) - expected).abs().max() <= 0.05
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            low = PolicyModel(model)(FOREST).logprobs_T
        assert (low - PolicyModel(model)(FOREST).logprobs_T).abs().max() <= 0.05


def test_positions_are_counted_with_them() -> None:
    model = adapted(KINDS["prompt"], max_position_embeddings=16)
    engine = NativeEngine(model, stop_ids=(3,), pad_id=0)
    engine.generate([[5] * 7], SamplingSettings(max_new_tokens=6), NoiseKey(0, "t"))
    with pytest.raises(UserError, match="need 17 positions behind 3 virtual tokens, the model has 16"):
        engine.generate([[5] * 8], SamplingSettings(max_new_tokens=6), NoiseKey(0, "t"))


def test_a_prefix_is_not_computed_again() -> None:
    """peft alone would drop it without a word; embeddings can be."""
    with pytest.raises(UserError, match="train.checkpointing: a prefix lies in a cache"):
        enable_checkpointing(PolicyModel(adapted(KINDS["prefix"])))
    module = PolicyModel(adapted(KINDS["prompt"])).train()
    (-module(FOREST).logprobs_T.sum()).backward()
    plain = module.lm.prompt_encoder["default"].embedding.weight.grad.clone()
    module.zero_grad()
    enable_checkpointing(module)
    (-module(FOREST).logprobs_T.sum()).backward()
    torch.testing.assert_close(module.lm.prompt_encoder["default"].embedding.weight.grad, plain)


def test_other_adapters_have_none() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    assert virtual.count(model) == 0
    assert virtual.count(adapters.add_adapter(model, LoraSettings(rank=2), 0)) == 0
