"""The compiled attention against the formula, in float64 where that tells which of two is off."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from pipeline.data.forest import Forest, Segment, build, roots
from pipeline.llama import attention, kernel

pytestmark = pytest.mark.skipif(kernel.library() is None, reason="no C compiler when the package was installed")


def forest_of(*groups: list[tuple[int, int]]) -> Forest:
    """Groups of (tokens, parent)."""
    return build([[Segment([1] * n, parent) for n, parent in group] for group in groups])


FORESTS = {
    "one token": forest_of([(1, -1)]),
    "a tree": forest_of([(17, -1), (5, 0), (9, 0), (0, 0), (30, 3), (3, 4)], [(40, -1)], [(0, -1), (4, 0)]),
    "blocks of keys": forest_of([(150, -1), (70, 0), (64, 0)], [(129, -1)]),
    "several roots in a group": forest_of([(9, -1), (8, -1), (7, 1), (6, 0)]),
}
LAYOUTS = [(4, 4, 8), (8, 2, 8), (6, 2, 24), (4, 1, 16), (2, 2, 64), (3, 1, 40)]  # heads, key heads, size


def compute(rows: Tensor, forest: Forest, heads: int, kv: int, grad: Tensor, backend: str, window=None):
    leaf = rows.clone().requires_grad_()
    out = attention.attend(
        leaf, forest, heads=heads, kv_heads=kv, scale=rows.shape[-1] ** -0.5, window=window, backend=backend
    )
    out.backward(grad)
    return out.detach(), leaf.grad


def example(forest: Forest, heads: int, kv: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows with filling behind, and a gradient that is 0 there."""
    draw = torch.Generator().manual_seed(seed)
    tokens = len(attention.filled(forest.ids_T))
    rows = torch.randn(tokens, heads + 2 * kv, size, generator=draw)
    grad = torch.randn(tokens, heads, size, generator=draw)
    grad[len(forest) :] = 0.0
    return rows, grad


@pytest.mark.parametrize("window", [None, 6, 100])
@pytest.mark.parametrize(("heads", "kv", "size"), LAYOUTS)
@pytest.mark.parametrize("name", FORESTS)
def test_it_is_the_formula(name: str, heads: int, kv: int, size: int, window: int | None) -> None:
    forest = FORESTS[name]
    rows, grad = example(forest, heads, kv, size)
    out, grad_rows = compute(rows, forest, heads, kv, grad, "kernel", window)
    wanted, wanted_rows = compute(rows.double(), forest, heads, kv, grad.double(), "dense", window)
    assert (out - wanted)[: len(forest)].abs().max() <= 2e-6 * max(1.0, float(wanted.abs().max()))
    assert (grad_rows - wanted_rows).abs().max() <= 2e-6 * max(1.0, float(wanted_rows.abs().max()))
    assert (out[len(forest) :] == 0).all() and (grad_rows[len(forest) :] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_are_turned_as_before_it(dtype: torch.dtype) -> None:
    forest = FORESTS["a tree"]
    rows, grad = (x.to(dtype) for x in example(forest, 4, 2, 8))
    angles = torch.rand(len(rows), 1, 4, generator=torch.Generator().manual_seed(3)) * 6
    turn = torch.polar(torch.ones_like(angles), angles)
    found = []
    for backend in ("kernel", "dense"):
        leaf = rows.clone().requires_grad_()
        out = attention.attend(leaf * 1, forest, heads=4, kv_heads=2, scale=0.3, turn=turn, backend=backend)
        out.backward(grad)
        found.append((out[: len(forest)].float(), leaf.grad.float()))
    bound = 2e-6 if dtype == torch.float32 else 0.05
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= bound * max(1.0, float(b.abs().max()))


def test_two_tokens_by_hand() -> None:
    """Scores 0 and ln 3 weigh values 1 and 5 by 1/4 and 3/4."""
    forest = forest_of([(1, -1), (1, 0)])
    rows = torch.zeros(2, 3, 8)
    rows[1, 0, 0] = 8**0.5  # the second token's query
    rows[1, 1, 0] = torch.log(torch.tensor(3.0))  # its key
    rows[0, 2], rows[1, 2] = 1.0, 5.0
    out, _ = compute(rows, forest, 1, 1, torch.ones(2, 1, 8), "kernel")
    assert out[:, 0, 0].tolist() == pytest.approx([1.0, 4.0], abs=1e-6)


def test_scores_of_any_size() -> None:
    """Where one key takes all the weight the others get exactly nothing, and no gradient is lost or made up."""
    forest = FORESTS["a tree"]
    rows, grad = example(forest, 4, 2, 8)
    rows[:, :6] *= 300.0
    out, grad_rows = compute(rows, forest, 4, 2, grad, "kernel")
    wanted, wanted_rows = compute(rows.double(), forest, 4, 2, grad.double(), "dense")
    assert (out - wanted)[: len(forest)].abs().max() <= 0.05  # scores of 1e5 have 3 digits behind the point
    usual, usual_rows = compute(rows, forest, 4, 2, grad, "grouped")
    assert (out - usual)[: len(forest)].abs().max() <= 0.05
    assert (grad_rows - wanted_rows).abs().max() <= 2 * (usual_rows - wanted_rows).abs().max() + 1e-3


def test_bfloat16_rounds_once() -> None:
    forest = FORESTS["blocks of keys"]
    rows, grad = (x.bfloat16() for x in example(forest, 4, 2, 16))
    out, grad_rows = compute(rows, forest, 4, 2, grad, "kernel")
    wanted, wanted_rows = compute(rows.double(), forest, 4, 2, grad.double(), "dense")
    assert out.dtype == grad_rows.dtype == torch.bfloat16
    assert ((out - wanted).abs() <= 2**-8 * wanted.abs() + 1e-6)[: len(forest)].all()
    usual = compute(rows, forest, 4, 2, grad, "grouped")[1]
    assert (grad_rows - wanted_rows).square().mean() <= (usual - wanted_rows).square().mean()


def test_the_same_bits_on_any_number_of_threads() -> None:
    forest = FORESTS["a tree"]
    rows, grad = example(forest, 8, 2, 8)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(compute(rows, forest, 8, 2, grad, "kernel"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_other_groups_change_no_bit() -> None:
    """A group's results are the same alone and between others, poisoned with NaN."""
    forest = forest_of([(20, -1)], [(17, -1), (5, 0), (30, 0)], [(3, -1)])
    rows, grad = example(forest, 4, 2, 8)
    mine = slice(20, 72)
    rows[: mine.start] = rows[mine.stop :] = float("nan")
    out, grad_rows = compute(rows, forest, 4, 2, grad, "kernel")
    alone = forest_of([(17, -1), (5, 0), (30, 0)])
    wanted, wanted_rows = compute(rows[mine], alone, 4, 2, grad[mine], "kernel")
    assert torch.equal(out[mine], wanted) and torch.equal(grad_rows[mine], wanted_rows)
    assert out[: mine.start].isnan().all()  # and nothing is hidden


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(poison: float) -> None:
    forest = forest_of([(40, -1)])
    for part in (0, 4, 6):  # a query, a key, a value of token 20
        rows, grad = example(forest, 4, 2, 8)
        rows[20, part, 3] = poison
        out, _ = compute(rows, forest, 4, 2, grad, "kernel")
        assert not torch.isfinite(out[20]).all()
        assert part == 6 or torch.isfinite(out[:20]).all()


def test_scores_of_minus_infinity_show_and_tiny_ones_are_ranked() -> None:
    forest = forest_of([(3, -1)])
    for query, shown in ((-float("inf"), True), (-1e33, False)):
        rows = torch.zeros(3, 3, 8)
        rows[2, 0, 0] = query
        rows[:, 1, 0] = torch.tensor([1.0, 1.5, 2.0])
        rows[:, 2] = torch.tensor([10.0, 20.0, 30.0])[:, None]
        out = attention.attend(rows, forest, heads=1, kv_heads=1, scale=1.0)[2, 0]
        assert out.isnan().all() if shown else (out == 10.0).all()


def test_empty_groups_and_windows_beyond_everything() -> None:
    for groups in ([[], [(5, -1)]], [[(5, -1)], []], [[(2, -1)], [], [(3, -1)]]):
        forest = forest_of(*groups)
        rows, grad = example(forest, 4, 2, 8)
        found = compute(rows, forest, 4, 2, grad, "kernel", 2**32)
        for a, b in zip(found, compute(rows, forest, 4, 2, grad, "dense"), strict=True):
            assert (a - b)[: len(forest)].abs().max() <= 2e-6 * max(1.0, float(b.abs().max()))


def test_swiglu_of_gates_of_any_size() -> None:
    gates = torch.tensor([-1e38, -1e37, -100.0, -1.0, 0.0, 1.0, 100.0, 1e30] * 2)
    x = torch.stack((gates, torch.ones(16)), 0).view(1, 32)
    assert (kernel.swiglu(x)[0] - torch.nn.functional.silu(gates)).abs().max() <= 1e-6
    leaf = gates.double().requires_grad_()
    torch.nn.functional.silu(leaf).sum().backward()
    assert (kernel.swiglu(x, torch.ones(1, 16))[0, :16] - leaf.grad).abs().max() <= 1e-6


def test_memory_of_another_type_is_refused() -> None:
    forest = forest_of([(3, -1)])
    rows, _ = example(forest, 4, 2, 8)
    with pytest.raises(TypeError, match="takes contiguous"):
        kernel.on_forest(rows.half(), forest, 4, 2, 1.0)
    with pytest.raises(TypeError, match="not contiguous"):
        kernel.swiglu(torch.zeros(32, 4).t())
    half = torch.zeros(1, 32, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="float32"):
        kernel.swiglu(half, torch.zeros(1, 16))


def test_another_default_type_changes_nothing() -> None:
    forest = FORESTS["a tree"]
    rows, grad = example(forest, 4, 2, 8)
    wanted = compute(rows, forest, 4, 2, grad, "kernel")
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = compute(rows, forest, 4, 2, grad, "kernel")
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_random_forests() -> None:
    rng = random.Random(0)
    for seed in range(30):
        groups = []
        for _ in range(rng.randint(1, 5)):
            group = [(rng.randint(0, 40), -1)]
            group += [(rng.choice([0, 1, 3, 15, 33]), rng.randint(-1, i)) for i in range(rng.randint(0, 6))]
            groups.append(group)
        forest = forest_of(*groups)
        if not len(forest):
            continue
        rows, grad = example(forest, 4, 2, 16, seed)
        for found, wanted in zip(
            compute(rows, forest, 4, 2, grad, "kernel"), compute(rows, forest, 4, 2, grad, "dense"), strict=True
        ):
            assert (found - wanted)[: len(forest)].abs().max() <= 1e-5


def test_exponentials_are_within_two_units_in_the_last_place() -> None:
    """Of one key and itself: the first token's weight in the second's sum is exp(s) / (1 + exp(s))."""
    scores = torch.linspace(-80.0, 0.0, 4001)
    forest = build([[Segment([1]), Segment([1], 0)] for _ in scores])
    rows = torch.zeros(2 * len(scores), 3, 8)
    rows[1::2, 0, 0] = 8**0.5
    rows[::2, 1, 0] = scores
    rows[::2, 2, 0] = 1.0
    found = attention.attend(rows, forest, heads=1, kv_heads=1, scale=8**-0.5)[1::2, 0, 0].double()
    given = (rows[1::2, 0, 0] * (8**-0.5 * 1.4426950408889634) * rows[::2, 1, 0]).double()  # as float32 rounds it
    wanted = given.exp2() / (1 + given.exp2())
    assert ((found - wanted).abs() / wanted).max() <= 6 * 2**-24  # 2 of it, and a sum, its inverse and a product


@pytest.mark.parametrize(("heads", "kv", "size"), LAYOUTS)
def test_a_step_is_the_last_row_of_the_forest(heads: int, kv: int, size: int) -> None:
    """Prompts stored in the rows of their samples, then a token appended to some of them."""
    lengths = torch.tensor([5, 70, 17])
    slots = torch.tensor([[4, 0], [1, 5], [2, 3]])
    forest = roots(torch.ones(int(lengths.sum()), dtype=torch.int64), lengths)
    draw = torch.Generator().manual_seed(0)
    columns, width = 80, heads + 2 * kv
    angles = torch.rand(columns, size // 2, generator=draw)
    turns = torch.stack((angles.cos(), angles.sin()), -1).flatten(1)

    def turned(rows: Tensor, positions: Tensor) -> Tensor:
        pairs = torch.view_as_complex(rows[:, : heads + kv].unflatten(-1, (-1, 2)))
        factors = torch.polar(torch.ones_like(angles), angles)[positions, None]
        return torch.cat((torch.view_as_real(pairs * factors).flatten(-2), rows[:, heads + kv :]), 1)

    prompts = torch.randn(len(forest), width, size, generator=draw)
    keys = torch.full((6, kv, size, columns), float("nan"))
    values = torch.full((6, kv, columns, size), float("nan"))
    kernel.store(prompts, turns, forest.start_S, forest.length_S, slots, keys, values)
    rows = torch.tensor([0, 1, 3])
    own = torch.randn(3, width, size, generator=draw)
    out = kernel.step(own, turns, rows, lengths, keys, values, append=True)
    again = kernel.step(own, turns, rows, lengths, keys, values, append=False)
    assert torch.equal(out, again)
    for n in range(3):
        whole = turned(torch.cat((prompts[forest.segment_T == n], own[n : n + 1])), torch.arange(lengths[n] + 1))
        one = roots(torch.ones(len(whole), dtype=torch.int64), torch.tensor([len(whole)]))
        wanted = attention.attend(whole, one, heads=heads, kv_heads=kv, scale=size**-0.5, backend="dense")[-1]
        assert (out[n] - wanted.flatten()).abs().max() <= 2e-6


def test_sequences_without_parents_are_laid_out_as_by_build() -> None:
    ids, lengths = torch.tensor([5, 6, 7, 8, 9, 4]), torch.tensor([3, 1, 2])
    found, wanted = roots(ids, lengths), build([[Segment([5, 6, 7])], [Segment([8])], [Segment([9, 4])]])
    for name in ("ids_T", "positions_T", "predictor_T", "segment_T", "start_S", "length_S", "parent_S", "group_S"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    assert torch.equal(found.last_S, wanted.last_S) and torch.equal(found.weights_T, wanted.weights_T)


def test_what_it_takes() -> None:
    cpu, single = torch.device("cpu"), torch.float32
    assert kernel.usable(cpu, 64, single, single, torch.bfloat16)
    assert not kernel.usable(torch.device("meta"), 64, single, single)
    assert not kernel.usable(cpu, 12, single, single)
    assert not kernel.usable(cpu, 512, single, single)
    assert not kernel.usable(cpu, 64, torch.float16, single, torch.bfloat16)
