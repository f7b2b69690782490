"""Preference losses as settings: one class of settings for each loss, made from the union in algo/preference.py.

    loss: {name: simpo, beta: 2.0, gamma: 1.0}     what a plan says
    config.loss.made()                             SimPo(beta=2.0, gamma=1.0)

Names, defaults, bounds and sentences are those of the loss's own fields. No torch here: planning reads this.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, create_model, model_validator
from pydantic_core import PydanticCustomError

from pipeline.algo.preference import LOSSES, PreferenceLoss, hyperparameters, make_loss
from pipeline.flow.config import UNKNOWN, Settings


class LossSettings(Settings):
    """A preference loss by name, with its hyperparameters."""

    loss: ClassVar[type[PreferenceLoss]]

    @model_validator(mode="before")
    @classmethod
    def _only_its_own(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            name, known = cls.loss.name, hyperparameters(cls.loss.name)
            unknown = [str(key) for key in values if key not in (*known, "name")]
            if unknown:
                words = f"the loss {name} has no {', '.join(unknown)}; it has: {', '.join(known)}"
                raise PydanticCustomError(UNKNOWN, "{words}", {"words": words, "keys": unknown})
        return values

    def made(self) -> PreferenceLoss:
        """The loss itself."""
        return make_loss(**self.model_dump())


def settings_of(loss: type[PreferenceLoss]) -> type[LossSettings]:
    """A class of settings with the loss's name as its tag and the loss's fields."""
    hints = typing.get_type_hints(loss)
    made: dict[str, Any] = {
        f.name: (hints[f.name], Field(default=f.default, description=f.metadata["help"], **f.metadata["bounds"]))
        for f in fields(loss)
    }
    tag: Any = (Literal[loss.name], Field(default=loss.name, description="Which loss this is."))
    about = (loss.__doc__ or "").partition("\n")[0]
    cls = create_model(loss.__name__, __base__=LossSettings, __doc__=about, name=tag, **made)
    cls.loss = loss
    return cls


SETTINGS: dict[str, type[LossSettings]] = {name: settings_of(loss) for name, loss in LOSSES.items()}

if TYPE_CHECKING:
    AnyLoss = LossSettings
else:
    AnyLoss = Annotated[typing.Union[tuple(SETTINGS.values())], Field(discriminator="name")]  # noqa: UP007


def default_loss(name: str) -> LossSettings:
    """The settings of a loss as they are without any given."""
    return SETTINGS[name].model_validate({"name": name})
