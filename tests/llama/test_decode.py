from __future__ import annotations

import copy

import pytest
import torch
import transformers

from pipeline.flow.errors import UserError
from pipeline.llama import decode, kernel, modeling
from pipeline.llama.adapters import LoraSettings, add_adapter

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], [16, 17, 18, 19, 20]]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def new_model(kind: str = "core", **changes):
    torch.manual_seed(0)
    shape = {**SHAPE, **changes}
    if kind == "core":
        model = modeling.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    elif kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    elif kind == "mistral":
        model = transformers.MistralForCausalLM(transformers.MistralConfig(sliding_window=None, **shape))
    else:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape))
    for p in model.parameters():  # biases and norms too
        torch.nn.init.normal_(p, std=0.2) if p.ndim == 1 else None
    return model.eval()


def full_logits(model, ids, prompt=0):
    """The plain forward of one sequence, no cache, no padding: [T, V]. `prompt` tokens are read as a whole, if any."""
    whole = prompt and getattr(model.config, "prefix_attention", False)
    more = {"prefix_lengths": torch.tensor([prompt])} if whole else {}
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False, **more).logits[0].float()


def padded(prompts):
    length = max(map(len, prompts))
    ids = torch.tensor([p + [0] * (length - len(p)) for p in prompts])
    return ids, torch.tensor([len(p) for p in prompts])


CASES = [
    ("core", decode.LayerRunner, {}),
    ("core", decode.LayerRunner, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("core", decode.LayerRunner, {"rope_parameters": LLAMA3, "num_key_value_heads": 4, "head_dim": 16}),
    ("core", decode.LayerRunner, {"num_hidden_layers": 1, "num_key_value_heads": 1}),
    ("core", decode.ForwardRunner, {}),
    ("llama", decode.LayerRunner, {}),
    ("llama", decode.ForwardRunner, {"attn_implementation": "eager"}),
    ("mistral", decode.ForwardRunner, {}),
    ("qwen2", decode.ForwardRunner, {}),
]


@pytest.mark.parametrize(("kind", "runner_type", "changes"), CASES)
def test_cached_decoding_equals_the_full_forward(kind, runner_type, changes):
    """T52, T17: prompts of mixed lengths, two rows each, then steps of the same rows fed different tokens."""
    model = new_model(kind, **changes)
    cache = decode.new_cache(model, rows=8, columns=16)
    runner = runner_type(model, cache)
    ids, lengths = padded(PROMPTS)
    slots = torch.tensor([[0, 5], [1, 4], [7, 2], [3, 6]])
    with torch.no_grad():
        logits = runner.prefill(ids, lengths, slots)
        for prompt, got in zip(PROMPTS, logits, strict=True):
            torch.testing.assert_close(got, full_logits(model, prompt)[-1], atol=1e-5, rtol=1e-5)
        sequences: list[list[int]] = [[]] * 8
        for prompt, rows in zip(PROMPTS, slots.tolist(), strict=True):
            for row in rows:
                sequences[row] = list(prompt)
        for step in range(4):
            fed = [(11 * row + 5 * step) % 97 for row in range(8)]
            at = torch.tensor([len(s) for s in sequences])
            sequences = [[*s, t] for s, t in zip(sequences, fed, strict=True)]
            got = runner.step(torch.tensor(fed), at, int(at.max()) + 1)
            for row, sequence in enumerate(sequences):
                torch.testing.assert_close(got[row], full_logits(model, sequence)[-1], atol=1e-5, rtol=1e-5)


def test_rows_can_be_moved():
    model = new_model()
    cache = decode.new_cache(model, rows=4, columns=16)
    runner = decode.LayerRunner(model, cache)
    ids, lengths = padded(PROMPTS)
    with torch.no_grad():
        runner.prefill(ids, lengths, torch.arange(4)[:, None])
        cache.move(torch.tensor([3, 2]), torch.tensor([0, 1]), 8)
        got = runner.step(torch.tensor([30, 31]), lengths[[3, 2]], 8)
    for row, sequence in enumerate(([*PROMPTS[3], 30], [*PROMPTS[2], 31])):
        torch.testing.assert_close(got[row], full_logits(model, sequence)[-1], atol=1e-5, rtol=1e-5)


def test_long_prompts_go_through_fused_attention(monkeypatch):
    model = new_model()
    monkeypatch.setattr(decode, "MATMUL_UP_TO", 4)
    ids, lengths = padded(PROMPTS)
    with torch.no_grad():
        runner = decode.LayerRunner(model, decode.new_cache(model, 4, 8))
        got = runner.prefill(ids, lengths, torch.arange(4)[:, None])
    for prompt, row in zip(PROMPTS, got, strict=True):
        torch.testing.assert_close(row, full_logits(model, prompt)[-1], atol=1e-5, rtol=1e-5)


def test_adapters_are_called_and_can_be_switched_off():
    peft = pytest.importorskip("peft")
    plain = new_model()
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(plain), lora).eval()
    ids, lengths = padded(PROMPTS)

    def last_logits():
        cache = decode.new_cache(model, 4, 8)
        runner = decode.new_runner(model, cache)
        assert isinstance(runner, decode.LayerRunner)
        with torch.no_grad():
            return runner.prefill(ids, lengths, torch.arange(4)[:, None])[0]

    torch.testing.assert_close(last_logits(), full_logits(model, PROMPTS[0])[-1], atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(last_logits(), full_logits(plain, PROMPTS[0])[-1], atol=1e-5, rtol=1e-5)


def test_lower_precision_is_close():
    model = new_model(initializer_range=0.05)
    ids, lengths = padded(PROMPTS)
    slots = torch.arange(4)[:, None]
    with torch.no_grad():
        exact = decode.LayerRunner(model, decode.new_cache(model, 4, 8)).prefill(ids, lengths, slots)
        for runner_type in (decode.LayerRunner, decode.ForwardRunner):
            low = runner_type(model, decode.new_cache(model, 4, 8), torch.bfloat16)
            got = low.prefill(ids, lengths, slots)
            assert got.dtype == torch.float32
            assert not torch.equal(got, exact)
            torch.testing.assert_close(got, exact, atol=0.03, rtol=0.03)


def test_which_runner_serves_which_model():
    assert decode.runs_by_layer(new_model("core"))
    assert decode.runs_by_layer(new_model("llama"))
    assert not decode.runs_by_layer(new_model("qwen2"))
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert not decode.runs_by_layer(new_model("llama", rope_parameters=rope))


def test_a_sliding_window_shorter_than_the_cache_is_refused():
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**SHAPE, sliding_window=8))
    decode.new_runner(model, decode.new_cache(model, 2, 8))
    with pytest.raises(UserError, match="sliding window"):
        decode.new_runner(model, decode.new_cache(model, 2, 9))


def test_sampling_mode_puts_everything_back():
    """T33: dropout is off inside, and what was in train mode is so again, also after an error."""
    model = new_model()
    model.train()
    model.model.layers[0].eval()
    before = {n: m.training for n, m in model.named_modules()}
    with pytest.raises(ZeroDivisionError), decode.sampling_mode(model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert {n: m.training for n, m in model.named_modules()} == before


def test_sharded_weights_are_refused():
    """T47: a policy that is not gathered has empty parameters."""
    model = new_model()
    model.lm_head.weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(RuntimeError, match="gather"), decode.sampling_mode(model):
        pass


def test_cache_memory_is_predicted():
    model = new_model()
    cache = decode.new_cache(model, 4, 8)
    with torch.no_grad():
        decode.LayerRunner(model, cache).prefill(*padded(PROMPTS), torch.arange(4)[:, None])
    layers = [cache.slot(i) for i in range(3)]
    taken = sum(x.nbytes for layer in layers for x in (layer.keys, layer.values))
    assert taken == 4 * decode.row_bytes(model, 8) == 4 * 16 * 384  # columns in multiples of 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_it_changes_no_bit(dtype):
    """Precision of sampling is the engine's own setting, and the kernel reads float32."""
    model = new_model()
    ids, lengths = padded(PROMPTS)

    def logits():
        with decode.sampling_mode(model):
            return decode.new_runner(model, decode.new_cache(model, 4, 8)).prefill(
                ids, lengths, torch.arange(4)[:, None]
            )

    wanted = logits()
    with torch.autocast("cpu", dtype):
        assert torch.equal(logits(), wanted)


# --- a step in one call -------------------------------------------------------------------------------------

needs_kernel = pytest.mark.skipif(kernel.library() is None, reason="no C compiler when the package was installed")
SHAPES = {
    "grouped": {},
    "one key head": {"num_key_value_heads": 1, "vocab_size": 64},
    "wide heads": {"hidden_size": 96, "num_attention_heads": 4, "head_dim": 24, "intermediate_size": 112},
    "other angles": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
}


def entered(model, rows: int):
    """A runner with a prompt of 1 to 7 tokens in each of its rows, what to feed next, and at which position."""
    draw = torch.Generator().manual_seed(rows)
    lengths = torch.randint(1, 8, (rows,), generator=draw)
    ids = torch.randint(0, 60, (rows, 7), generator=draw)
    runner = decode.new_runner(model, decode.new_cache(model, rows, 16))
    with torch.no_grad():
        runner.prefill(ids, lengths, torch.arange(rows)[:, None])
    return runner, torch.randint(0, 60, (rows,), generator=draw), lengths


@needs_kernel
@pytest.mark.parametrize("rows", [1, 3, 8, 21])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_in_one_call_is_the_step_by_operators(monkeypatch, shape: str, rows: int):
    model = new_model(**SHAPES[shape])
    together, tokens, positions = entered(model, rows)
    apart, *_ = entered(model, rows)
    with torch.no_grad():
        for _ in range(3):
            monkeypatch.setattr(decode, "IN_ONE_UP_TO", 1024)
            logits = together.step(tokens, positions, 16)
            monkeypatch.setattr(decode, "IN_ONE_UP_TO", 0)
            expected = apart.step(tokens, positions, 16)
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
            tokens, positions = expected.argmax(-1) % 60, positions + 1
    assert together._decoder is not None and apart._decoder is None
    for layer in range(3):
        torch.testing.assert_close(together.cache.slot(layer).keys, apart.cache.slot(layer).keys, atol=2e-5, rtol=1e-5)


@needs_kernel
def test_a_rows_bits_do_not_depend_on_the_others_or_on_threads():
    """Of 21 rows some are computed eight at a time, some four, some alone; one has a token that is no number."""
    model = new_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[61] = float("nan")
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            runner, tokens, positions = entered(model, 21)
            tokens[13] = 61
            with torch.no_grad():
                found.append(runner.step(tokens, positions, 16))
                alone = torch.cat([runner.step(tokens[:n], positions[:n], 16)[n - 1 :] for n in range(1, 13)])
            assert torch.equal(alone, found[-1][:12])
    finally:
        torch.set_num_threads(threads)
    assert found[0][13].isnan().all() and found[0][14:].isfinite().all()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=0, rtol=0, equal_nan=True)


@needs_kernel
@pytest.mark.parametrize("what", ["bias", "adapter", "hook", "odd size", "other activation", "large"])
def test_what_has_to_be_called_by_itself_is(what: str):
    model = new_model(
        **{
            "bias": {"attention_bias": True},
            "odd size": {"intermediate_size": 40},
            "other activation": {"hidden_act": "gelu"},
            "large": {"hidden_size": 1056, "num_attention_heads": 4, "head_dim": 8},
        }.get(what, {})
    )
    if what == "adapter":
        model = add_adapter(model, LoraSettings(rank=2), 0)
    if what == "hook":
        model.model.norm.register_forward_hook(lambda *_: None)
    runner, tokens, positions = entered(model, 2)
    with torch.no_grad():
        runner.step(tokens, positions, 16)
    assert runner._decoder is None
