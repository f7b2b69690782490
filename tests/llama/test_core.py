"""Every option of the core is held to the same: forest, cache, files, classifiers, parameter counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import DynamicCache

from pipeline.data.forest import build
from pipeline.flow.errors import UserError
from pipeline.llama import decode
from pipeline.llama.adapters import quiet
from pipeline.llama.core import CoreForCausalLM, CoreForSequenceClassification
from pipeline.llama.core_config import CoreConfig, new_config
from pipeline.llama.make import new_classifier
from pipeline.llama.modeling import LlamaForCausalLM
from pipeline.llama.open import open_classifier, open_policy
from pipeline.llama.presets import ModelSettings, cached_numbers, parameter_count
from tests.architectures import CASES
from tests.llama.test_attention import alone, example, gradients, grouped, on_forest
from tests.llama.test_decode import PROMPTS, full_logits, padded
from tests.small import policy, save, scorer

MIXTRAL = ("mlp.gate.weight", "experts.gate_up_proj", "experts.down_proj")
# What others can say; all else has our own model type.
KINDS = {"geglu": "llama", "experts": "mixtral", "experts, window": "mixtral", "window": "mistral"}
KINDS |= dict.fromkeys(("interpolation", "dynamic NTK", "YaRN"), "llama")


def model(case: str, seed: int = 0):
    """With norms and biases that are not 1 and 0."""
    made = policy(seed, spread=0.2, **CASES[case]).model
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
    return made


@pytest.mark.parametrize("case", CASES)
def test_the_forest_equals_each_sequence_alone(case: str) -> None:
    made, groups = model(case), example()
    expected = alone(made, groups)
    weights = torch.randn_like(expected)
    wanted = gradients(made, expected, weights)
    for forest in (build(groups), grouped(groups)):
        found = on_forest(made, forest)
        assert (found - expected).abs().max() <= 1e-5
        for (name, _), a, b in zip(made.named_parameters(), gradients(made, found, weights), wanted, strict=True):
            assert (a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max())), name


@pytest.mark.parametrize("case", CASES)
def test_cached_decoding_equals_the_full_forward(case: str) -> None:
    """Through the runner that sampling takes, and through transformers' own cache."""
    made = model(case)
    runner = decode.new_runner(made, decode.new_cache(made, rows=4, columns=16))
    ids, lengths = padded(PROMPTS)
    with torch.no_grad():
        got = [runner.prefill(ids, lengths, torch.arange(4)[:, None])]
        sequences = [list(prompt) for prompt in PROMPTS]
        for step in range(4):
            fed, at = [(11 * row + 5 * step) % 97 for row in range(4)], torch.tensor([len(s) for s in sequences])
            sequences = [[*s, t] for s, t in zip(sequences, fed, strict=True)]
            got.append(runner.step(torch.tensor(fed), at, int(at.max()) + 1))
        for row, sequence in enumerate(sequences):
            whole = full_logits(made, sequence, len(PROMPTS[row]))[-5:]
            torch.testing.assert_close(torch.stack([g[row] for g in got]), whole, atol=1e-5, rtol=1e-5)
        first = made(torch.tensor([sequences[0][:6]]), use_cache=True)
        rest = made(torch.tensor([sequences[0][6:]]), past_key_values=first.past_key_values)
        torch.testing.assert_close(rest.logits[0], full_logits(made, sequences[0])[6:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_rows_padded_on_either_side_equal_each_alone(case: str) -> None:
    made = model(case)
    with torch.no_grad():
        for side in ("left", "right"):
            for prompt in PROMPTS:
                fill = [0] * (8 - len(prompt))
                row = fill + prompt if side == "left" else prompt + fill
                real = [0] * len(fill) + [1] * len(prompt) if side == "left" else [1] * len(prompt) + [0] * len(fill)
                at = torch.tensor([real])
                positions = (at.cumsum(-1) - 1).clamp(min=0)
                out = made(torch.tensor([row]), attention_mask=at, position_ids=positions, use_cache=False).logits
                torch.testing.assert_close(out[0, at[0] > 0], full_logits(made, prompt), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_files_open_again_with_the_same_bits_and_never_pretend(case: str, tmp_path: Path) -> None:
    made, ids = model(case), torch.tensor([PROMPTS[0]])
    artifact = save(tmp_path / "a", "policy", made)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["model_type"] == KINDS.get(case, "rlhf_llama")
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:  # LLaMA's names; experts one by one
        names = {name for name in file.keys() if ".block_sparse_moe." not in name}  # noqa: SIM118
        assert names == {name for name in made.state_dict() if not name.endswith(MIXTRAL)}
    opened = open_policy(artifact)
    assert type(opened.model) is type(made) and opened.record["implementation"] == "core"
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), opened.model.parameters(), strict=True))
    save(tmp_path / "b", "policy", opened.model)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with torch.no_grad(), quiet():
        expected = made(ids).logits
        assert torch.equal(opened.model(ids).logits, expected)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
        foreign = type(theirs).__module__.startswith("transformers.")
        assert foreign == (case in KINDS) and (foreign or type(theirs) is CoreForCausalLM)
        assert (theirs(ids).logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_a_reward_model_over_it_keeps_its_layers(case: str, tmp_path: Path) -> None:
    made, ids = new_classifier(model(case), 0).eval(), torch.tensor([PROMPTS[0]])
    opened = open_classifier(save(tmp_path / "a", "reward_model", made))
    assert type(opened.model) is type(made)
    with torch.no_grad():
        assert torch.equal(opened.model(ids).logits, made(ids).logits) and made(ids).logits.shape == (1, 1)


@pytest.mark.parametrize("case", CASES)
def test_caches_hold_as_many_bytes_a_token_as_the_formula_says(case: str) -> None:
    """Our own, and transformers', which lets go of what a window hides."""
    made = model(case)
    shape = made.config.to_dict()
    token = 4 * cached_numbers(shape)
    cache = decode.new_cache(made, rows=4, columns=16)
    theirs = DynamicCache(config=made.config)
    with torch.no_grad():
        decode.new_runner(made, cache).prefill(*padded(PROMPTS), torch.arange(4)[:, None])
        made(torch.randint(4, 97, (1, 24)), past_key_values=theirs, use_cache=True)
    taken = [sum(x.nbytes for at in held.layers for x in (at.keys, at.values)) for held in (cache, theirs)]
    assert taken[0] == 4 * 16 * token == 4 * decode.row_bytes(made, 16)
    window = shape.get("sliding_window")
    assert taken[1] == (window - 1 if window and not shape["first_tokens"] else 24) * token


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_counted_exactly(case: str) -> None:
    shape = ModelSettings(preset="test", **CASES[case]).llama(97)
    made = model(case)
    assert parameter_count({**shape, "vocab_size": made.config.vocab_size}) == sum(p.numel() for p in made.parameters())


def test_plain_llama_stays_what_it_is() -> None:
    """Options at their defaults, said aloud, are the same class and the same config."""
    plain = new_config(ModelSettings(preset="test").llama(97))
    said = {"norm": "rms", "norm_placement": "pre", "feed_forward": "swiglu", "num_local_experts": 0}
    loud = new_config(ModelSettings(preset="test", **said).llama(97))
    assert type(plain) is type(loud) is transformers.LlamaConfig and plain.to_dict() == loud.to_dict()
    assert ModelSettings(preset="test", **said).identity() == ModelSettings(preset="test").identity() | said
    assert type(policy(feed_forward="geglu").model) is LlamaForCausalLM
    assert isinstance(scorer(norm="layer").model, CoreForSequenceClassification)


@pytest.mark.parametrize("change", [{"num_hidden_layers": "2"}, {"norm_scale": 2}, {"norm": "batch"},
                                    {"norm": "deep"}, {"hidden_act": "gelu"}, {"attention_dropout": 0.1},
                                    {"num_local_experts": 3}, {"num_experts_per_tok": 1}])  # fmt: skip
def test_our_own_type_says_only_what_it_knows(change: dict, tmp_path: Path) -> None:
    artifact = save(tmp_path / "a", "policy", model("relu"))
    path = tmp_path / "a" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=next(iter(change))) as refused:
        open_policy(artifact)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_config_of_nonsense_is_refused_where_it_is_made() -> None:
    with pytest.raises(ValueError, match="set norm_placement to post"):
        CoreConfig(norm="deep")
