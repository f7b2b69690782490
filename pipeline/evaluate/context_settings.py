"""What an evaluation measures of long contexts. No torch: plans read this."""

from __future__ import annotations

from pydantic import Field, model_validator

from pipeline.flow.config import Settings
from pipeline.llama.rope_settings import ContextSettings

SHORTEST = 32  # tokens of a passkey text: the statement, the question and something between


class ContextMeasures(Settings):
    """Perplexity by position on `documents`, and retrieval of a pass key hidden among their sentences."""

    max_tokens: int = Field(default=1024, ge=2, description="Windows that documents are cut into.")
    bucket: int = Field(default=128, ge=1, description="Positions that are averaged.")
    passkey: list[int] = Field(
        default=[128, 256, 512, 1024],
        description="Lengths in tokens at which a pass key is asked for (Mohtashami and Jaggi 2023, section 4.2).",
    )
    depths: int = Field(default=5, ge=1, description="Places of the key, evenly from the beginning to before the end.")
    trials: int = Field(default=20, ge=1, description="Keys at each length and place.")
    words: int = Field(default=3, ge=1, le=16, description="Words of a key; one of 36 to this power by chance.")

    untrained: dict[str, ContextSettings] = Field(
        default={}, description="By name other rotary positions, under which the reference is measured as it is."
    )

    @model_validator(mode="after")
    def _fits(self) -> ContextMeasures:
        if short := [length for length in self.passkey if length < SHORTEST]:
            raise ValueError(f"passkey: {short[0]} tokens leave no text around a key; at least {SHORTEST}")
        if len(set(self.passkey)) < len(self.passkey):
            raise ValueError("passkey: a length stands there twice")
        return self

    @property
    def places(self) -> list[float]:
        """Depths from 0 on, in equal steps, 1 left out: there the key would stand beside the question."""
        return [place / self.depths for place in range(self.depths)]
