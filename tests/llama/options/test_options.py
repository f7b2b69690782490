"""Which options go together, what is refused in one line, and who else can say a shape."""

from __future__ import annotations

import pytest

from pipeline.llama.options import form, refuse
from pipeline.llama.presets import ModelSettings

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
    assert not {"norm", "feed_forward", "num_local_experts"} & ModelSettings(preset="test").identity().keys()
    assert ModelSettings(preset="test", norm="layer").identity()["norm"] == "layer"
