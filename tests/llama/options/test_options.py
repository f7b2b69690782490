"""Which options go together, what is refused in one line, and who else can say a shape."""

from __future__ import annotations

import pytest

from pipeline.llama.options import form, refuse
from pipeline.llama.presets import ModelSettings
from tests.architectures import LATENT

EXPERTS = {"num_local_experts": 4}
REFUSED = [
    ({"norm": "batch"}, "norm is 'batch', expected one of rms, layer, deep"),
    ({"norm": "deep"}, "set norm_placement to post"),
    ({"norm": "deep", "norm_placement": "sandwich"}, "set norm_placement to post"),
    ({"num_experts_per_tok": 3}, "set num_local_experts"),
    ({"router_aux_loss_coef": 0.5}, "set num_local_experts"),
    ({**EXPERTS, "num_experts_per_tok": 5}, "from 1 to num_local_experts (4)"),
    ({**EXPERTS, "num_local_experts": True}, "num_local_experts is True"),
    ({**EXPERTS, "router_aux_loss_coef": -1.0}, "router_aux_loss_coef is -1.0"),
    ({**EXPERTS, "feed_forward": "relu"}, "experts are gated: set it to swiglu, geglu, glu"),
    ({**EXPERTS, "mlp_bias": True}, "mlp_bias is set"),
    ({"positions": "roformer"}, "expected one of rotary, alibi, t5, learned, sinusoidal, none"),
    ({"positions": "none", "rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "do nothing under positions none"),
    ({"relative_attention_num_buckets": 16}, "set positions to t5"),
    ({"positions": "alibi", "relative_attention_max_distance": 64}, "set positions to t5"),
    ({"positions": "t5", "relative_attention_num_buckets": 1}, "a whole number from 2"),
    ({"positions": "t5", "relative_attention_num_buckets": 9, "prefix_attention": True}, "an even number from 4"),
    ({"positions": "t5", "relative_attention_max_distance": 16}, "a whole number above 16"),
    ({"sliding_window": 0}, "sliding_window is 0"),
    ({"sliding_window": True}, "sliding_window is True"),
    ({"first_tokens": 4}, "set sliding_window"),
    ({"first_tokens": -1, "sliding_window": 8}, "first_tokens is -1"),
    ({"prefix_attention": 1}, "true or false was expected"),
    ({"prefix_attention": True, "sliding_window": 8}, "leave one out"),
    ({"attention": "latent"}, "attention latent needs kv_lora_rank"),
    ({"kv_lora_rank": 8}, "set attention to latent"),
    ({**LATENT, "v_head_dim": 0}, "v_head_dim is 0"),
    ({**LATENT, "qk_rope_head_dim": 5}, "qk_rope_head_dim 5 is odd"),
    ({**LATENT, "positions": "alibi"}, "set positions to rotary, or attention to full"),
    ({**LATENT, "norm": "deep", "norm_placement": "post"}, "set norm to layer, or attention to full"),
    ({**LATENT, "num_attention_heads": 4, "num_key_value_heads": 2}, "leave it out, or set it to null where"),
]
FORMS = [
    ({}, "llama"),
    ({"feed_forward": "glu", "mlp_bias": True}, "llama"),
    ({"feed_forward": "silu"}, "rlhf_llama"),
    ({"norm": "layer"}, "rlhf_llama"),
    ({"norm_placement": "sandwich"}, "rlhf_llama"),
    (EXPERTS, "mixtral"),
    ({**EXPERTS, "feed_forward": "geglu", "num_experts_per_tok": 1}, "mixtral"),
    ({**EXPERTS, "attention_bias": True}, "rlhf_llama"),
    ({**EXPERTS, "norm": "layer"}, "rlhf_llama"),
    ({"sliding_window": 8}, "mistral"),
    ({"sliding_window": 8, "mlp_bias": True}, "rlhf_llama"),
    ({**EXPERTS, "sliding_window": 8}, "mixtral"),
    ({"sliding_window": 8, "first_tokens": 2}, "rlhf_llama"),
    ({"positions": "none"}, "rlhf_llama"),
    ({"prefix_attention": True}, "rlhf_llama"),
    (LATENT, "rlhf_llama"),
]


@pytest.mark.parametrize(("shape", "words"), REFUSED, ids=str)
def test_senseless_combinations_are_refused_in_one_line(shape: dict, words: str) -> None:
    with pytest.raises(ValueError) as refused:
        refuse(shape)
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("shape", "expected"), FORMS, ids=str)
def test_what_plain_transformers_can_say_is_said_so(shape: dict, expected: str) -> None:
    refuse(shape)
    assert form(shape) == expected


def test_settings_name_the_key_and_keep_old_rows() -> None:
    with pytest.raises(ValueError, match="mlp_bias is set"):
        ModelSettings(preset="test", **EXPERTS, mlp_bias=True)
    assert ModelSettings(preset="test", norm="deep").llama(97)["norm_placement"] == "post"
    with pytest.raises(ValueError, match="set norm_placement to post"):
        ModelSettings(preset="test", norm="deep", norm_placement="pre")
    for given in ({"rope_theta": 100.0}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}):
        with pytest.raises(ValueError, match="does nothing under positions alibi"):
            ModelSettings.model_validate({"preset": "test", "positions": "alibi", **given})
    without = ModelSettings(preset="llama-3.1-8b", positions="none").llama(9)
    assert not {"rope_theta", "rope_parameters"} & without.keys()
    with pytest.raises(ValueError, match="head_dim: attention latent"):
        ModelSettings(preset="test", **LATENT, head_dim=8)
    assert ModelSettings(preset="test", **LATENT).llama(97)["num_key_value_heads"] == 4
    assert not {"norm", "feed_forward", "num_local_experts"} & ModelSettings(preset="test").identity().keys()
    assert ModelSettings(preset="test", norm="layer").identity()["norm"] == "layer"
