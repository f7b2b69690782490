"""Settings of what pretraining reads: shares of sources, duplicates, overlap with evaluation sets. No numpy here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from pipeline.flow.config import Settings, nearest
from pipeline.flow.errors import UserError


class MixtureSettings(Settings):
    """Shares of several sources."""

    weights: dict[str, float] = Field(
        description="Share of each source in the tokens that are read, in relation to the others, by the name of the "
        "source or row; every source needs one (Touvron et al. 2023, table 1, has sampling proportions of this kind)."
    )
    passes: Literal["one", "several"] = Field(
        default="one",
        description="one: no document is read twice, and sources that are plentiful for their weight are read in part; "
        "several: every document is read, and scarce sources again and again, which costs little up to four passes "
        "(Muennighoff et al. 2023).",
    )

    @model_validator(mode="after")
    def _positive(self) -> MixtureSettings:
        if odd := [name for name, weight in self.weights.items() if weight <= 0]:
            raise ValueError(f"weights: {odd[0]} must be above 0; leave a source out of the row instead")
        return self

    def require_names(self, stage: str, sources: Sequence[str]) -> None:
        """UserError where weights and sources do not name the same. For a stage's `check_names`."""
        for name in self.weights:
            if name not in sources:
                raise UserError(
                    f"{stage}.mixture.weights: the row reads nothing called {name!r}{nearest(name, sources)}"
                )
        for name in sources:
            if name not in self.weights:
                raise UserError(f"{stage}.mixture.weights: {name} has none; every source that is mixed needs one")
        if twice := [name for name in sources if list(sources).count(name) > 1]:
            raise UserError(f"{stage}.mixture.weights: two sources are called {twice[0]}; read one of them elsewhere")


class CleaningSettings(Settings):
    """What is left out before anything is learnt from it."""

    duplicates: Literal["keep", "exact", "near"] = Field(
        default="keep",
        description="exact: a document that repeats an earlier one but for white space is left out; near: also one "
        "that shares its runs of five words with it, found by MinHash (Lee et al. 2022; 14 bands of 8 as in FineWeb, "
        "Penedo et al. 2024).",
    )
    similarity: float = Field(
        default=0.8,
        ge=0.7,
        le=1,
        description="Jaccard similarity of the sets of five-word runs from which two documents are near duplicates; "
        "92 % of those at 0.8 are found, 56 % at 0.7 (Lee et al. 2022: 0.8).",
    )
    ngram: int = Field(
        default=13,
        ge=1,
        description="Words of a run that a document must not share with the row's evaluation sets (Brown et al. 2020, "
        "appendix C: 13; evaluation texts of 8 to 12 words are looked for whole).",
    )
    common: int = Field(
        default=10,
        ge=0,
        description="A run in more documents than this is a common phrase and does not count; 0 counts all (Brown et "
        "al. 2020, appendix C: 10).",
    )
    contaminated: Literal["drop", "cut"] = Field(
        default="drop",
        description="drop leaves out a whole document that shares a run; cut takes out the run with 200 characters on "
        "both sides, pieces shorter than that, and documents that fall into more than ten (Brown et al. 2020, "
        "appendix C).",
    )

    def require_used(self, stage: str, evaluations: bool) -> None:
        """UserError for a setting that has no effect beside the others. For a stage's `check`."""
        plain = CleaningSettings()
        idle = () if self.duplicates == "near" else ("similarity",)
        for name in (*idle, *(() if evaluations else ("ngram", "common", "contaminated"))):
            if getattr(self, name) != getattr(plain, name):
                needed = "duplicates: near" if name == "similarity" else "evaluation sets: give the row `evaluations`"
                raise UserError(f"{stage}.clean.{name}: has no effect without {needed}")
