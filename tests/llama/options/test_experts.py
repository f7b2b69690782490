"""Mixtures of experts are transformers' Mixtral, both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from pipeline.flow.errors import UserError
from pipeline.llama.adapters import quiet
from pipeline.llama.core import CoreForCausalLM
from pipeline.llama.core_config import CoreConfig
from pipeline.llama.open import open_policy
from pipeline.llama.options.experts import Experts
from tests.small import artifact, chat

ROPE = {"rope_theta": 500.0, "rope_type": "default"}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]])


def mixtral(directory: Path, **changes: object) -> transformers.MixtralForCausalLM:
    """Of transformers' own, in a directory with a tokenizer."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "initializer_range": 0.2,
    }  # fmt: skip
    made = transformers.MixtralForCausalLM(transformers.MixtralConfig(**{**shape, **changes})).eval()
    with quiet():
        made.save_pretrained(directory)
    chat().tokenizer.save_pretrained(directory)
    return made


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts_per_tok": 3, "hidden_act": "gelu", "head_dim": 16},
        {"num_experts_per_tok": 1, "tie_word_embeddings": True, "rope_parameters": ROPE},
    ],
    ids=str,
)  # fmt: skip
def test_a_mixtral_of_transformers_opens_in_the_core_and_goes_back(changes: dict, tmp_path: Path) -> None:
    theirs = mixtral(tmp_path / "theirs", **changes)
    opened = open_policy(artifact(tmp_path / "theirs", "policy"))
    assert type(opened.model) is CoreForCausalLM and opened.record["implementation"] == "core"
    with torch.no_grad(), quiet():
        assert (opened.model(IDS).logits - theirs(IDS).logits).abs().max() <= 1e-5
        opened.model.save_pretrained(tmp_path / "ours")
        assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (
            tmp_path / "theirs" / "model.safetensors"
        ).read_bytes()
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        assert type(back) is transformers.MixtralForCausalLM
        assert (back.eval()(IDS).logits - theirs(IDS).logits).abs().max() <= 1e-6
    ours = json.loads((tmp_path / "ours" / "config.json").read_text())
    given = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert ours == {**given, "head_dim": given["head_dim"] or 8}  # said aloud


@pytest.mark.parametrize("change", [{"router_jitter_noise": 0.1}, {"hidden_act": "relu"}, {"num_of_shared": 2}])
def test_a_mixtral_beyond_the_core_goes_to_transformers(change: dict, tmp_path: Path) -> None:
    mixtral(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    opened = open_policy(artifact(tmp_path, "policy"))
    assert opened.record["implementation"] == "MixtralForCausalLM" and next(iter(change)) in opened.record["why"][0]


def test_more_experts_than_the_weights_have_are_refused_before_they_are_made(tmp_path: Path) -> None:
    mixtral(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_local_experts": 4096}))
    with pytest.raises(UserError, match="num_local_experts is 4096, the weights have 4"):
        open_policy(artifact(tmp_path, "policy"))


def test_one_expert_of_two_by_hand() -> None:
    """Router logits 1 and 0: with one chosen its weight is 1, with two they are softmax(1, 0)."""
    x = torch.zeros(1, 1, 4)
    x[..., 0] = 1.0
    for each, expected in ((1, 2.0), (2, 2 * 0.7310586 + 3 * 0.2689414)):
        block = Experts(
            CoreConfig(hidden_size=4, intermediate_size=4, num_attention_heads=1, num_local_experts=2,
                       num_experts_per_tok=each, feed_forward="glu")
        ).eval()  # fmt: skip
        with torch.no_grad():
            for p in block.parameters():
                p.zero_()
            block.gate.weight[0, 0] = 1.0
            block.experts.gate_up_proj[:, 4, 0] = 2.0  # up of 2, gate sigmoid(0) = 1 / 2: an inner value of 1
            block.experts.down_proj[0, 0, 0], block.experts.down_proj[1, 0, 0] = 2.0, 3.0
            assert block(x)[0, 0, 0].item() == pytest.approx(expected, abs=1e-6)
