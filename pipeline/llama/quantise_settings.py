"""A frozen base in few bits: what a plan can say of it, and what of it lies beside an adapter.

    adapter: {rank: 16, quantise: {kind: nf4}}                    QLoRA (Dettmers et al. 2023)
    adapter: {rank: 16, quantise: {kind: int8, threshold: 6}}     LLM.int8() (Dettmers et al. 2022)

No torch or bitsandbytes here: plans read the settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.flow.artifacts import read_object
from pipeline.flow.config import Settings
from pipeline.flow.errors import UserError

QUANTISATION = "base_quantisation.json"  # beside an adapter's own files


class Nf4Settings(Settings):
    """Blocks of 64 weights as 4-bit quantiles of a normal distribution (Dettmers et al. 2023, section 3)."""

    kind: Literal["nf4"]
    double: bool = Field(
        default=True, description="Quantise the scales of the blocks too: 4.127 bits a weight instead of 4.5."
    )
    compute: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Precision in which the restored weights are multiplied."
    )

    @property
    def rounds(self) -> bool:
        """Whether two ways to the same number differ by more than float32 lets them."""
        return self.compute == "bf16"


class Int8Settings(Settings):
    """Absolute maxima of each output's weights and of each token as 127 (Dettmers et al. 2022, section 3)."""

    kind: Literal["int8"]
    threshold: float = Field(
        default=6.0,
        ge=0,
        description="Features that reach it in some token are multiplied in full precision (section 3.2); 0: none.",
    )

    @property
    def rounds(self) -> bool:
        return True


AnyQuantise = Annotated[Nf4Settings | Int8Settings, Field(discriminator="kind")]
_READ: TypeAdapter[Nf4Settings | Int8Settings] = TypeAdapter(AnyQuantise)


def stored(directory: Path) -> Nf4Settings | Int8Settings | None:
    """How the base of the adapter in a directory is quantised; None where it is not."""
    path = directory / QUANTISATION
    if not path.exists():
        return None
    try:
        return _READ.validate_python(read_object(path))
    except ValidationError as problem:
        first = problem.errors()[0]
        raise UserError(
            f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; expected what `adapter.quantise` takes"
        ) from problem


def of(model: Any) -> Nf4Settings | Int8Settings | None:
    """How a model's weights are quantised; None where they are not."""
    return next((m.quantisation for m in model.modules() if hasattr(m, "quantisation")), None)


def rounds(model: Any) -> bool:
    """Whether a model's log-probs by two ways, cached and whole, may differ as in bfloat16."""
    found = of(model)
    return found is not None and found.rounds


def weights_of(parameter: Any) -> int:
    """How many weights a parameter stands for: two of 4 bits lie in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
