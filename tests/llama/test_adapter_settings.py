"""What may be said about adapters, what is left of it in a stored one, and what enters a row's identity."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.flow.config import parse_settings
from pipeline.flow.errors import UserError
from pipeline.llama.adapter_settings import (
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PTuningSettings,
    WeightsSettings,
    require_place,
    settings_of,
)
from stages.sft import Sft


def parsed(**adapter: Any) -> Any:
    return parse_settings(Sft.Config, {"adapter": adapter}, "sft").adapter


def test_the_kind_chooses_the_settings_and_lora_goes_without_saying() -> None:
    assert parsed(rank=4) == parsed(kind="lora", rank=4) == LoraSettings(rank=4)
    assert isinstance(parsed(kind="ia3"), Ia3Settings)
    assert parsed(kind="prefix", tokens=7, projection=9) == PrefixSettings(kind="prefix", tokens=7, projection=9)
    assert parsed(kind="p_tuning", encoder="lstm").encoder == "lstm"
    assert parsed(kind="weights").train == ("*",)


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ({"kind": "lorra"}, "sft.adapter: kind: one of lora, ia3, prefix, prompt, p_tuning, weights was expected"),
        ({"kind": "ia3", "rank": 4}, "sft.adapter: unknown key 'rank'"),
        ({"rank": 4, "tokens": 4}, "sft.adapter: unknown key 'tokens'"),
        ({"dora": True, "initial": "pissa"}, "dora and initial: pissa cannot be saved as one LoRA"),
        ({"dora": True, "beneath": "stack"}, "use beneath: merge"),
        ({"initial": "pissa", "beneath": "stack"}, "use beneath: merge"),
        ({"kind": "weights", "beneath": "stack"}, "kind: weights makes none: use beneath: merge"),
        ({"kind": "weights", "train": []}, "sft.adapter.train"),
        ({"rate_ratio": 0}, "sft.adapter.rate_ratio"),
        ({"kind": "prompt", "tokens": 0}, "sft.adapter.tokens"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_key(adapter: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        parsed(**adapter)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("option", "adapter", "told"),
    [
        ({"attention": "latent"}, {"rank": 4, "targets": "query_value"}, "set it to attention or linear"),
        ({"attention": "latent"}, {"kind": "ia3"}, "adapter.kind: ia3 changes keys and values"),
        ({"attention": "latent"}, {"kind": "prefix"}, "adapter.kind: prefix changes keys and values"),
        ({"sliding_window": 8}, {"kind": "prompt"}, "of which sliding_window lets go but for 0 first_tokens"),
        ({"sliding_window": 8, "first_tokens": 4}, {"kind": "p_tuning", "tokens": 5}, "but for 4 first_tokens"),
    ],
)
def test_adapters_that_a_model_has_no_place_for_are_refused(option: dict, adapter: dict, told: str) -> None:
    with pytest.raises(UserError) as error:
        require_place(option, parsed(**adapter))
    assert told in str(error.value)
    require_place(option, parsed(kind="weights"))
    require_place({"positions": "alibi", "prefix_attention": True}, parsed(**adapter))


def test_rows_from_before_there_were_other_kinds_keep_their_identity() -> None:
    before = {"rank": 4, "alpha": 32.0, "dropout": 0.0, "targets": "linear"}
    assert LoraSettings(rank=4).identity() == before
    assert LoraSettings(rank=4, dora=True, beneath="merge").identity() == {**before, "dora": True, "beneath": "merge"}
    assert Ia3Settings(kind="ia3").identity() == {"kind": "ia3"}


def test_what_is_left_in_a_stored_adapter() -> None:
    told = LoraSettings(rank=4, alpha=6, dropout=0.1, rate_ratio=8, rank_stabilised=True, beneath="merge").plain()
    assert told == LoraSettings(rank=4, alpha=6, rank_stabilised=True)
    assert LoraSettings(rank=4, alpha=6, initial="pissa").plain() == LoraSettings(rank=8, alpha=12)
    stabilised = LoraSettings(rank=4, alpha=6, initial="pissa", rank_stabilised=True).plain()
    assert stabilised.alpha / stabilised.rank**0.5 == pytest.approx(6 / 4**0.5)  # the scale is what it was
    assert PTuningSettings(kind="p_tuning", tokens=5, encoder="lstm", hidden=9).plain() == PTuningSettings(
        kind="p_tuning", tokens=5
    )
    assert WeightsSettings(kind="weights", train=("a",)).plain() == WeightsSettings(kind="weights")


def test_a_configuration_of_peft_is_read_back() -> None:
    from pipeline.llama.adapters import peft_config

    for settings in (
        LoraSettings(rank=4, alpha=6.0, targets="attention", dora=True),
        Ia3Settings(kind="ia3"),
        PrefixSettings(kind="prefix", tokens=5),
        PTuningSettings(kind="p_tuning", tokens=5),
    ):
        assert settings_of(peft_config(settings, classifier=False).to_dict()) == settings
    assert settings_of({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens"]}) is None
    assert settings_of({"peft_type": "VERA"}) is None
