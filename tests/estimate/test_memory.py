"""Memory by hand: the worked numbers of ZeRO, and activations against what autograd really keeps."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from pipeline.estimate import memory
from pipeline.estimate.memory import MIXED, SINGLE, Drawing, Layout, Work
from pipeline.estimate.shape import Model, Shape
from pipeline.llama.adapters import LoraSettings
from pipeline.llama.presets import PRESETS

TINY, SEVEN = Shape.of(PRESETS["test"]), Shape.of(PRESETS["llama-7b"])
POLICY = Model(SEVEN, "policy")


@pytest.mark.parametrize(
    ("parameters", "ranks", "expected"),
    [
        (7.5e9, 64, [120.0, 31.40625, 16.640625, 1.875]),
        (7e9, 8, [112.0, 38.5, 26.25, 14.0]),
        (6.738415616e9, 8, [107.814649856, 37.061285888, 25.26905856, 13.476831232]),
    ],
)
def test_model_states_by_stage(parameters: float, ranks: int, expected: list[float]):
    found = [memory.zero(parameters, ranks=ranks, stage=stage) / 1e9 for stage in range(4)]
    assert found == pytest.approx(expected, rel=1e-12)


def test_offload_moves_states_to_the_host():
    moved = memory.states(8, ranks=2, stage=2, widths=MIXED, offload="optimizer")
    assert (moved.weights, moved.gradients, moved.optimiser, moved.host) == (16, 0, 0, 8 + 48)
    everything = memory.states(8, ranks=2, stage=3, widths=MIXED, offload="all")
    assert (everything.device, everything.host) == (0, 64)
    assert memory.states(8, ranks=2, stage=1, offload="optimizer").gradients == 16


def test_sixteen_bytes_in_every_precision():
    assert memory.states(1, widths=MIXED).device == memory.states(1, widths=SINGLE).device == 16
    assert memory.FEW["nf4"] * 8 == pytest.approx(4.127)


def test_frozen_weights_of_one_base_are_held_once():
    lora = LoraSettings(rank=2)
    over = [Model(TINY, "base", lora), Model(TINY, "base", lora, scalar=True), Model(TINY, "other")]
    own = sum(m.own for m in over)
    assert memory.whole_weights(over, shared=True) == 4 * (2 * TINY.parameters + own)
    assert memory.whole_weights(over, shared=False) == 4 * sum(m.parameters for m in over)


def kept_by_autograd(lora: LoraSettings | None, bf16: bool, tokens: int) -> tuple[float, Shape]:
    """Bytes of the tensors that a forward pass below the head keeps, each storage once, parameters left out."""
    import torch

    from pipeline.data.forest import roots
    from pipeline.llama.adapters import add_adapter
    from pipeline.llama.heads import hidden_states
    from tests import small

    made = small.policy(hidden_size=64, intermediate_size=192, num_hidden_layers=6)
    shape = Shape.of(made.model.config.to_dict())
    model = made.model if lora is None else add_adapter(made.model, lora, seed=0)
    lengths = torch.full((tokens // 64,), 64)
    forest = roots(torch.arange(tokens) % 97, lengths)
    own = {p.data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(x: Any) -> Any:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    cast = torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext()
    with cast, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = hidden_states(model.train(), forest)
    assert out.requires_grad
    return float(sum(found.values())), shape


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4), LoraSettings(rank=4, targets="attention")])
@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_what_autograd_keeps(lora: LoraSettings | None, bf16: bool):
    from pipeline.llama import kernel

    if kernel.library() is None:
        pytest.skip("the counts of a CPU are those of the compiled kernel")
    tokens = 1024
    found, shape = kept_by_autograd(lora, bf16, tokens)
    model, layout = Model(shape, "a", lora), Layout(half=bf16)
    counted = memory.activations(model, layout, tokens, checkpointing=False, longest=64)
    assert counted == pytest.approx(found, rel=0.05)


def test_recomputation_keeps_the_inputs_of_layers_and_one_layer():
    layout, size = Layout(), 1000
    whole = memory.activations(POLICY, layout, size, checkpointing=False, longest=64)
    less = memory.activations(POLICY, layout, size, checkpointing=True, longest=64)
    layer = size * memory.kept(POLICY, layout, 64) + memory.copied_weights(POLICY, layout)
    assert whole - less == pytest.approx(31 * layer - 32 * size * 4 * SEVEN.hidden)


def test_logits_are_held_in_chunks():
    rows = memory.CHUNK // SEVEN.vocabulary
    few, stays = memory.logits(SEVEN, Layout(), rows)
    many, nothing = memory.logits(SEVEN, Layout(), 100 * rows)
    states = 4 * SEVEN.hidden
    assert few == rows * (8 * SEVEN.vocabulary + states) and stays == rows * (4 * SEVEN.vocabulary + states)
    assert many == 8 * rows * SEVEN.vocabulary + 100 * rows * states and nothing == 100 * rows * states


def test_a_cache_holds_as_many_rows_as_its_bytes():
    drawing = Drawing(rows=256, columns=500, cache=1 << 30, new=64)
    assert memory.cache_rows(drawing, SEVEN, 2) == (1 << 30) // (512 * 524_288)
    assert memory.cache_rows(replace(drawing, rows=2), SEVEN, 2) == 2
    assert memory.cache_bytes(replace(drawing, rows=2), SEVEN, 2) == 2 * 512 * 524_288


def test_every_way_to_save_memory_saves_some():
    work = Work(
        Layout(ranks=8, strategy="ddp", half=True, on_cpu=False), (POLICY,), (Model(SEVEN, "reference"),), longest=512
    )
    base = memory.peak(work).total
    for change in (
        {"checkpointing": True},
        {"token_budget": 2048},
        {"trained": (Model(SEVEN, "policy", LoraSettings()),)},
        *({"layout": replace(work.layout, strategy="deepspeed", stage=stage)} for stage in (1, 2, 3)),
        {"layout": replace(work.layout, frozen="sharded")},
        {"layout": replace(work.layout, frozen="offloaded")},
        {"layout": replace(work.layout, strategy="fsdp", stage=3)},
    ):
        assert memory.peak(replace(work, **change)).total < base, change  # type: ignore[arg-type]


def test_the_largest_budget_is_the_last_that_fits():
    work = Work(Layout(), (Model(TINY, "policy"),), longest=64, token_budget=512)
    room = memory.peak(work, 5000).total
    found = memory.largest_budget(work, room)
    assert found == 5000 and memory.peak(work, 5001).total > room
    assert memory.largest_budget(work, memory.peak(work, 63).total) == 0
    assert memory.largest_budget(work, 1e15) == memory.MOST


@pytest.mark.parametrize(
    ("size", "text"), [(7, "7 B"), (1500, "1.5 KB"), (2_340_000, "2.34 MB"), (8e9, "8 GB"), (3e12, "3 TB")]
)
def test_sizes_for_people(size: float, text: str):
    assert memory.human(size) == text


def test_what_a_gpu_holds_while_models_come_to_it():
    """A policy, a reference and a reward model of 7B, in float32; ZeRO-3 casts what is trained to 16 bits first."""
    reward = Model(SEVEN, "reward", scalar=True)
    work = Work(layout=Layout(on_cpu=False), trained=(POLICY,), frozen=(Model(SEVEN, "reference"), reward))
    started = lambda **layout: memory.peak(replace(work, layout=replace(work.layout, half=True, **layout))).phases[
        "starting"
    ]
    room = lambda phase: (phase - memory.FIXED["cuda"]) / memory.SLACK["cuda"] / 4
    whole, scalar = POLICY.whole, reward.whole
    assert room(started()) == pytest.approx(2 * whole + scalar)
    assert room(started(ranks=4, strategy="ddp", frozen="sharded")) == pytest.approx(whole + (whole + scalar) / 4)
    assert room(started(ranks=4, strategy="ddp", frozen="offloaded")) == pytest.approx(whole)
    zero = {"ranks": 4, "strategy": "deepspeed", "stage": 3, "frozen": "sharded"}
    assert room(started(**zero)) == pytest.approx((whole + scalar) / 4 + whole / 2 + whole / 4)  # its cut beside it
