from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.algo.quantise import absmax, doubled, mixed_product, nf4
from pipeline.data.forest import Segment, build
from pipeline.flow.errors import UserError
from pipeline.llama import quantise_settings
from pipeline.llama.adapter_settings import LoraSettings, WeightsSettings
from pipeline.llama.adapters import add_adapter, merged, share_frozen
from pipeline.llama.heads import PolicyModel, hidden_states
from pipeline.llama.open import open_start, open_trainable
from pipeline.llama.quantise_settings import Int8Settings, Nf4Settings
from pipeline.llama.quantised import Int8Linear, Nf4Linear, quantise, restore
from tests.small import policy, same, save

NF4, INT8 = Nf4Settings(kind="nf4"), Int8Settings(kind="int8")
FOREST = build([[Segment([5, 6, 7, 8], weights=[1.0] * 4), Segment([9, 10], 0, weights=[1.0] * 2)]])
EVERY = [NF4, Nf4Settings(kind="nf4", double=False), INT8, Int8Settings(kind="int8", threshold=0)]


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(128, 32, bias=False).to(dtype)


def made(settings: Any, dtype: torch.dtype = torch.float32) -> Any:
    return (Int8Linear if settings.kind == "int8" else Nf4Linear)(linear(dtype), settings)


def inputs(rows: int = 5) -> torch.Tensor:
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(1))
    x[0, 3] = 8.0
    return x


def wide() -> Any:
    return policy(hidden_size=64, intermediate_size=128).model


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_a_layer_is_the_formula(settings: Any) -> None:
    layer, x, weight = made(settings), inputs(), linear().weight.detach()
    if settings.kind == "int8":
        codes, largest = absmax(weight.half().float(), dim=1)
        expected = mixed_product(x, codes, largest, settings.threshold)
        assert (layer(x) - expected).abs().max() <= 2e-3 * expected.abs().max()  # half-precision quotients
    else:
        found = nf4(weight)
        scales = doubled(found.scales).restored() if settings.double else found.scales
        same(layer.restored(), found._replace(scales=scales).restored().view(32, 128))
        same(layer(x), x @ layer.restored().T, atol=1e-5)


@pytest.mark.parametrize("settings", [NF4, INT8], ids=str)
def test_training_evaluation_and_autocast_are_one_arithmetic(settings: Any) -> None:
    """bitsandbytes has other ways in evaluation mode on some CPUs (NF4) and in training mode on all (int8)."""
    layer, x = made(settings), inputs().requires_grad_(True)
    trained = layer.train()(x)
    bits = layer.weight.data.clone()
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), trained)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(x), trained)
    assert torch.equal(layer.weight.data, bits) and layer.weight.data.dtype == bits.dtype
    (grad,) = torch.autograd.grad(trained.sum(), x)
    same(grad, layer.restored().sum(0).expand(5, -1), atol=1e-5)


def test_the_products_of_nf4_are_in_the_precision_that_was_asked_for() -> None:
    layer, x = made(Nf4Settings(kind="nf4", compute="bf16")), inputs()
    assert torch.equal(layer(x), (x.bfloat16() @ layer.restored().bfloat16().T).float())


def test_a_base_is_quantised_from_what_the_file_holds() -> None:
    whole = made(NF4, torch.bfloat16).restored()
    same(whole, Nf4Linear(linear(torch.bfloat16).float(), NF4).restored(), atol=0)


@pytest.mark.parametrize("settings", [NF4, INT8], ids=str)
def test_the_trunk_is_quantised_and_its_heads_are_not(settings: Any) -> None:
    model, before = wide(), wide()
    quantise(model, settings)
    kinds = {type(m) for m in model.model.modules() if isinstance(m, nn.Linear)}
    assert kinds == {Int8Linear if settings.kind == "int8" else Nf4Linear} and type(model.lm_head) is nn.Linear
    assert quantise_settings.of(model) == settings and quantise_settings.of(before) is None
    count = lambda m: sum(map(quantise_settings.weights_of, m.parameters()))
    assert count(model) == count(before)
    states = hidden_states(model, FOREST)
    assert not torch.equal(states, hidden_states(before, FOREST))
    if settings.kind == "nf4":  # int8 reads activations of a whole pass: outliers of one row are those of all
        same(states, hidden_states(model, FOREST, padded=True), atol=1e-5)
    restore(model)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}


@pytest.mark.parametrize("settings", [NF4, INT8], ids=str)
def test_roles_on_one_base_hold_its_codes_once(settings: Any) -> None:
    models = [wide(), wide()]
    for model in models:
        quantise(model, settings)
        model.requires_grad_(False)
    before = hidden_states(models[1], FOREST)
    saved = share_frozen(*models)
    assert saved == sum(p.numel() * p.element_size() for p in models[0].parameters())
    assert torch.equal(hidden_states(models[1], FOREST), before)
    first, second = (m.model.layers[0].mlp.up_proj.weight for m in models)
    assert first.data_ptr() == second.data_ptr()


def test_merged_into_restored_weights() -> None:
    """T54: the sum is exact to float32, and a hundred merges later it still is."""
    model = wide()
    quantise(model, NF4)
    adapted = add_adapter(model, LoraSettings(rank=4), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    expected = PolicyModel(adapted).eval()(FOREST).logprobs_T
    drifting = copy.deepcopy(adapted)
    restore(drifting)
    start = PolicyModel(drifting)(FOREST).logprobs_T
    plain = merged(adapted)
    same(PolicyModel(plain)(FOREST).logprobs_T, expected, atol=1e-5)
    assert 0 < plain.merge_error <= 1e-5
    for _ in range(100):
        drifting.merge_adapter()
        drifting.unmerge_adapter()
    same(PolicyModel(drifting)(FOREST).logprobs_T, start, atol=1e-6)


def test_the_error_of_a_merge_is_what_int8_activations_lose() -> None:
    model = wide()
    quantise(model, INT8)
    plain = merged(add_adapter(model, LoraSettings(rank=4), seed=0))
    assert 1e-5 < plain.merge_error < 0.1


def test_what_starts_from_a_whole_policy(tmp_path: Path) -> None:
    """The reference is the quantised policy, to the bit, and the same base is quantised to the same bits."""
    whole = save(tmp_path / "base", "policy", wide())
    settings = LoraSettings(rank=4, quantise=NF4)
    trained, start = open_trainable(whole, settings, 0), open_start(whole, settings, 0)
    assert torch.equal(trained.module.eval()(FOREST).logprobs_T, start.module(FOREST).logprobs_T)
    assert not any(p.requires_grad for p in start.module.parameters())
    codes = [m.model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight for m in (trained, start)]
    assert torch.equal(*codes) and codes[0].data_ptr() != codes[1].data_ptr()


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="pissa takes directions out of the weights, which quantised ones cannot give"):
        LoraSettings(initial="pissa", quantise=NF4)
    with pytest.raises(ValueError, match="weights in few bits cannot be trained or saved whole"):
        WeightsSettings(kind="weights", quantise=INT8)
    with pytest.raises(UserError, match="no plain linear layers to quantise"):
        model = wide()
        quantise(model, NF4)
        quantise(model, NF4)
