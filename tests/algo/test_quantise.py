from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch

from pipeline.algo.quantise import (
    absmax,
    bits_each,
    doubled,
    dynamic_values,
    mixed_product,
    nf4,
    nf4_values,
    outliers,
    packed,
    restored,
)

BLOG = [1.2, -0.5, -4.3, 1.2, -3.1, 0.8, 2.4, 5.4]


@pytest.mark.parametrize(
    ("name", "values"),
    [("int8 absmax HF blog vector", BLOG), ("int8 absmax same vector with one outlier 60", [*BLOG, 60.0])],
)
def test_worked_absmax(oracles: dict[str, Any], name: str, values: list[float]) -> None:
    """T55: the error of everything else grows with one outlier."""
    want, x = oracles[name], torch.tensor(values, dtype=torch.float64)
    codes, largest = absmax(x)
    error = (restored(codes, largest) - x).abs().max().item()
    assert codes.tolist() == want["q"] and error == pytest.approx(want["max_err"], abs=1e-12)
    assert error <= want["bound_half_step"] == pytest.approx(largest.item() / 254)


def test_an_outlier_apart_leaves_the_rest_its_precision() -> None:
    """T55: by mixed decomposition, and with a scale for every output where it stands in another row."""
    x = torch.tensor([[*BLOG, 60.0]], dtype=torch.float64)
    one = torch.eye(9, dtype=torch.float64)
    codes, largest = absmax(one, dim=1)  # exact weights: what is left is the error of the input
    assert outliers(x, 6.0).tolist() == [False] * 8 + [True]
    plain = (mixed_product(x, codes, largest) - x).abs().max()
    apart = (mixed_product(x, codes, largest, threshold=6.0) - x).abs().max()
    assert plain == pytest.approx(0.21732283464566926) and apart == pytest.approx(0.0188976377952752)
    rows = torch.tensor([BLOG, [60.0] * 8], dtype=torch.float64)
    assert (restored(*absmax(rows, dim=1)) - rows)[0].abs().max() < 0.02
    assert (restored(*absmax(rows)) - rows)[0].abs().max() > 0.2


def test_a_vector_of_zeros_stays_zero() -> None:
    codes, largest = absmax(torch.zeros(2, 3), dim=1)
    assert not codes.any() and not restored(codes, largest).any()


@pytest.mark.parametrize("threshold", [0.0, 2.5, 6.0])
def test_int8_as_bitsandbytes_has_it(threshold: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 48, generator=generator).half()
    x[2, 7], x[4, 30] = 9.0, -7.0
    weight = torch.randn(16, 48, generator=generator).half()
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.clone())
    own, largest = absmax(weight.float(), dim=1)
    assert torch.equal(own, codes) and torch.equal(largest[:, 0], scales)
    x_codes, x_scales, columns = bnb.int8_vectorwise_quant(x.clone(), threshold=threshold)
    if threshold:
        assert columns.tolist() == outliers(x.float(), threshold).nonzero()[:, 0].tolist()
    out, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(x.float(), x_codes, codes, x_scales, scales, columns, None)
    want = mixed_product(x.double(), own, largest.double(), threshold)
    assert (out - want).abs().max() <= 1e-4 * want.abs().max()  # theirs are half-precision quotients of the inputs


def test_worked_nf4(oracles: dict[str, Any]) -> None:
    torch.testing.assert_close(nf4_values(), torch.tensor(oracles["nf4"]["derived"]), atol=1e-7, rtol=0)
    want = oracles["nf4 block W=[.02,-.01,.05,-.1,.08,0,-.03,.1]"]
    x = torch.tensor([0.02, -0.01, 0.05, -0.1, 0.08, 0.0, -0.03, 0.1])
    found = nf4(x)
    assert found.codes.tolist() == want["idx"] and packed(found.codes).numpy().tobytes().hex() == "96c0e74f"
    torch.testing.assert_close(found.restored(), torch.tensor(want["deq"]), atol=1e-6, rtol=0)
    assert (found.restored() - x).abs().max().item() == pytest.approx(want["max_err"], abs=1e-8)
    gaps = nf4_values().diff()
    worst = oracles["nf4 worst relative-to-absmax gap/2"]
    assert gaps.max().item() / 2 == pytest.approx(worst, abs=1e-7)
    line = torch.linspace(-1, 1, 4001)
    assert (nf4(line, 4001).restored() - line).abs().max().item() == pytest.approx(worst, abs=1e-3)
    assert bits_each(double=False) == oracles["nf4 bits/param blk64 fp32 absmax"]
    assert bits_each() == oracles["nf4 bits/param double quant (8b/64 + 32b/(64*256))"]


@pytest.mark.parametrize("shape", [(32, 128), (300, 64), (5, 172)])
def test_nf4_as_bitsandbytes_has_it(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    found = nf4(weight)
    assert torch.equal(packed(found.codes), codes.flatten())
    second = doubled(found.scales)
    torch.testing.assert_close(dynamic_values(), state.state2.code, atol=1e-7, rtol=0)
    assert torch.equal(second.blocks.codes, state.absmax) and torch.equal(second.mean, state.offset)
    torch.testing.assert_close(second.blocks.scales, state.state2.absmax, atol=0, rtol=1e-6)
    ours = found._replace(scales=second.restored()).restored().view(shape)
    torch.testing.assert_close(ours, bnb.dequantize_4bit(codes, state), atol=1e-8, rtol=1e-5)
    assert (found.scales - second.restored()).abs().max() < 0.01 * found.scales.max()
