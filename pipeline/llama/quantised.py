"""Linear layers in 8 or 4 bits by bitsandbytes, frozen, under adapters. Imported only where a plan asks for them.

    quantise(model, Nf4Settings(kind="nf4"))       in place: every linear layer but the heads
    restore(model)                                 in place: plain float32 layers of the quantised weights

The same weights give the same bits, on whatever device they are used later: they are quantised where they were loaded.
bitsandbytes 0.50 has three ways of its own on a CPU that would make training and evaluation two different models. They
are closed here: a second, lossy layout of NF4 weights in evaluation mode, products of unquantised activations for int8
in training mode, and wrong scales where a row of NF4 weights is no whole number of blocks.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.flow.errors import UserError
from pipeline.llama.adapters import quiet
from pipeline.llama.quantise_settings import AnyQuantise, Int8Settings, Nf4Settings

try:
    with quiet():
        import bitsandbytes as bnb
        from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib
except (ImportError, OSError, RuntimeError) as problem:
    raise UserError(
        f"bitsandbytes, which does the arithmetic of 8 and 4 bits, cannot be loaded ({problem}): install it (pip "
        "install bitsandbytes), or leave adapter.quantise and train.optimizer: adamw8bit out"
    ) from problem
if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
    raise UserError(
        "bitsandbytes has no compiled library for this machine: install a build that has (pip install "
        "--force-reinstall bitsandbytes), or leave adapter.quantise and train.optimizer: adamw8bit out"
    )

logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for every int8 product
BLOCK = 64
COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Nf4Linear(bnb.nn.Linear4bit):
    """A frozen linear layer of 4-bit weights; products in the settings' precision whatever surrounds them."""

    def __init__(self, layer: nn.Linear, settings: Nf4Settings) -> None:
        super().__init__(
            layer.in_features, layer.out_features, bias=False, compute_dtype=COMPUTE[settings.compute], device="meta"
        )
        self.quantisation = settings
        self.bias = layer.bias
        packed, state = bnb.functional.quantize_4bit(
            layer.weight.data.contiguous(), blocksize=BLOCK, compress_statistics=settings.double, quant_type="nf4"
        )
        state.dtype = torch.float32  # what they are restored to, whatever they were stored in
        self.weight = bnb.nn.Params4bit(
            packed,
            quant_state=state,
            compress_statistics=settings.double,
            quant_type="nf4",
            bnb_quantized=True,
            module=self,
        )
        self.support_avx512bf16_for_cpu = False

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)

    def restored(self) -> Tensor:
        weight = cast(bnb.nn.Params4bit, self.weight)
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()


class Int8Linear(bnb.nn.Linear8bitLt):
    """A frozen linear layer of 8-bit weights; the same arithmetic in training and evaluation."""

    def __init__(self, layer: nn.Linear, settings: Int8Settings) -> None:
        super().__init__(
            layer.in_features,
            layer.out_features,
            bias=False,
            has_fp16_weights=False,
            threshold=settings.threshold,
            device="meta",
        )
        self.quantisation = settings
        self.bias = layer.bias
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(layer.weight.data.to(torch.float16))
        self.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, SCB=scales)
        self.register_buffer("scales", scales, persistent=False)  # follows the layer to its device
        self.state.SCB = scales

    def forward(self, x: Tensor) -> Tensor:
        state: Any = self.state
        state.CB, state.SCB, state.is_training = self.weight.data, self.scales, False
        with torch.autocast(x.device.type, enabled=False):
            return bnb.matmul(x, self.weight, bias=self.bias, state=state)

    def restored(self) -> Tensor:
        return bnb.functional.int8_vectorwise_dequant(self.weight.data, cast(Tensor, self.scales)).float()


def quantise(model: Any, settings: AnyQuantise) -> None:
    """In place, layer by layer, so that no more than one is there twice. Embeddings, norms and heads stay as they are.

    UserError where a layer cannot be quantised so, or where there is none.
    """
    found = [
        (f"{path}.{name}" if path else name, parent, name, child)
        for path, parent in model.base_model.named_modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    if not found:
        raise UserError("adapter.quantise: this model has no plain linear layers to quantise: leave it out")
    for path, parent, name, layer in found:
        if isinstance(settings, Int8Settings):
            made: nn.Module = Int8Linear(layer, settings)
        elif layer.in_features % BLOCK:
            raise UserError(
                f"adapter.quantise: nf4 takes rows of whole blocks of {BLOCK} weights, and {path} has rows of "
                f"{layer.in_features}: use kind: int8"
            )
        else:
            made = Nf4Linear(layer, settings)
        setattr(parent, name, made.requires_grad_(False))
        layer.weight = cast(Any, None)  # `found` would keep it


def restore(model: Any) -> None:
    """Plain float32 layers in place of quantised ones, also of those that adapters wrap."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Nf4Linear | Int8Linear):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
                plain.weight = nn.Parameter(layer.restored(), requires_grad=False)
                plain.bias = layer.bias
                setattr(parent, name, plain)
