"""What answers are rewarded for. Pydantic only: planning a run imports no torch, and runs none of the functions.

reward:
  weights: {reward: 1.0, reward@b: 1.0}           # reward models by their rows
  combine: uncertainty                            # of the reward models: mean - k standard deviations
  uncertainty: 1.0
  functions:                                      # added to it, each times its weight
    - call: pipeline.rollout.checks.numeric_answer
      arguments: {after: "####"}
      weight: 2.0
    - call: my_rewards.politeness                 # of a module of your own
  modules: [my_rewards]
  overlong: {budget: 256, buffer: 64}
  clip: 5.0
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, StrictFloat, model_validator

from pipeline.flow.config import Settings, module_names, nearest
from pipeline.flow.errors import UserError
from pipeline.flow.modules import MISSING, source_file

CHECKS = "pipeline.rollout.checks"
PROXY = "proxy"  # the score that all sources together give
GIVEN = ("prompt", "text", "stopped", "answer")  # what every function gets, in this order


class RewardFunction(Settings):
    """A Python function as a source of reward.

    It is called as `function(prompt, text, stopped, answer, **arguments)`: the prompt's messages (a tuple of
    `pipeline.data.records.Message`), the answer's text, whether it stopped by itself, the prompt's reference answer
    (text or None); and returns a finite number.
    """

    call: str = Field(
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$",
        description="Import path of the function, such as pipeline.rollout.checks.exact_match.",
    )
    weight: float = Field(default=1.0, description="Factor of its score in the sum.")
    arguments: dict[str, Any] = Field(default={}, description="Keyword arguments of every call, JSON values.")
    name: str | None = Field(
        default=None, min_length=1, description="What its score is called; null takes the function's own name."
    )

    @property
    def module(self) -> str:
        return self.call.rpartition(".")[0]

    @property
    def function(self) -> str:
        return self.call.rpartition(".")[2]

    @property
    def source(self) -> str:
        """The name of its score."""
        return self.name or self.function

    @model_validator(mode="after")
    def _json(self) -> RewardFunction:
        try:
            json.dumps(self.arguments, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"arguments of {self.call}: expected JSON values ({error})") from error
        return self


class Overlong(Settings):
    """The soft overlong punishment of DAPO (Yu et al. 2025, eq. 13), in tokens."""

    budget: int = Field(ge=1, description="Length from which an answer loses the whole penalty.")
    buffer: int = Field(ge=1, description="Tokens before `budget` over which the penalty grows from 0.")
    penalty: float = Field(default=1.0, ge=0, description="Score that an answer of `budget` tokens or more loses.")

    @model_validator(mode="after")
    def _within(self) -> Overlong:
        if self.buffer > self.budget:
            raise ValueError(f"buffer {self.buffer} is longer than budget {self.budget}: lower it")
        return self


class RewardSettings(Settings):
    """Sources of reward, how they become one score, and what is added to it.

    The order: sources combined and summed, normalised, clipped, length terms, missing ends, whitened.
    """

    weights: dict[str, StrictFloat] = Field(
        default={},
        description="Factor of each reward model's score before models are combined, by the name of its row; 1 where "
        "none is given.",
    )
    combine: Literal["mean", "worst", "uncertainty"] = Field(
        default="mean",
        description="How several reward models become one: their mean, their minimum, or their mean less their "
        "disagreement (Coste et al. 2023).",
    )
    uncertainty: float = Field(
        default=1.0, ge=0, description="Standard deviations between reward models that combine: uncertainty takes off."
    )
    functions: tuple[RewardFunction, ...] = Field(
        default=(), description="Python functions whose scores, times their weights, are added to the reward models'."
    )
    modules: tuple[str, ...] = module_names(
        f"Modules beside {CHECKS} whose functions may be called: their code runs with your rights on text that a model "
        "wrote, so name only what you have read; a change of their source makes the row stale."
    )
    normalise: Literal["stored", "running"] = Field(
        default="stored",
        description="Whether scores keep the scale stored with the reward model, or are brought to mean 0 and variance "
        "1 by running statistics over everything sampled so far.",
    )
    clip: float | None = Field(
        default=None, gt=0, description="Normalised scores are cut to plus and minus this; null does not cut."
    )
    token_penalty: float = Field(
        default=0.0, description="Score lost for each token of an answer; below 0 length is rewarded."
    )
    overlong: Overlong | None = Field(
        default=None, description="Penalty that grows towards a length budget (DAPO's soft overlong punishment)."
    )
    unfinished_score: float | None = Field(
        default=None,
        description="Score of an answer that does not stop, instead of its own (-1 in Huang et al. 2024); null keeps "
        "its own.",
    )
    unfinished_penalty: float = Field(
        default=0.0, ge=0, description="Score that an answer loses when it does not stop (TRL's missing_eos_penalty)."
    )
    whiten: bool = Field(
        default=False, description="Bring each iteration's final scores to variance 1, over all ranks."
    )
    shift_mean: bool = Field(
        default=True,
        description="Whether `whiten` also takes off the mean (lm-human-preferences keeps it for rewards).",
    )

    @model_validator(mode="after")
    def _agree(self) -> RewardSettings:
        if self.unfinished_score is not None and self.unfinished_penalty:
            raise ValueError(
                f"unfinished_score {self.unfinished_score} replaces what unfinished_penalty {self.unfinished_penalty} "
                "is taken off: set unfinished_score to null, or leave unfinished_penalty at 0"
            )
        if (problem := next(_function_problems(self), None)) is not None:
            raise ValueError(problem)
        return self

    def require_source(self, stage: str, models: bool) -> None:
        """UserError where neither a reward model is wired (`models`) nor a function set. For a stage's `check`."""
        if not models and not self.functions:
            raise UserError(
                f"{stage}: nothing rewards an answer: wire a reward model (reward: reward.model), or set "
                f"{stage}.reward.functions"
            )

    def require_names(self, stage: str, models: Sequence[str]) -> None:
        """UserError where a weight is for no reward model of the row. For a stage's `check_names`."""
        for name in self.weights:
            if name not in models:
                raise UserError(f"{stage}.reward.weights: no reward model is of row {name!r}{nearest(name, models)}")

    def require_unset(self, stage: str) -> None:
        """UserError where a setting differs from its default although nothing is scored. For a stage's `check`."""
        plain = RewardSettings()
        changed = [name for name in type(self).model_fields if getattr(self, name) != getattr(plain, name)]
        if changed:
            raise UserError(
                f"{stage}.reward.{changed[0]}: has no effect, the scores in the store are taken as they are: wire a "
                f"reward model (reward: reward.model) or set {stage}.reward.functions, or leave {changed[0]} out"
            )


# ------------------------------------------------------------------------ functions, read and not yet imported


def _function_problems(settings: RewardSettings) -> Iterator[str]:
    for module in settings.modules:
        if source_file(module) is None:
            yield f"modules: {MISSING.format(module)}"
    allowed = (CHECKS, *settings.modules)
    for f in settings.functions:
        if f.module not in allowed:
            yield (
                f"functions: {f.call} is of a module that this plan does not allow{nearest(f.module, allowed)}; to "
                f"run its code, add {f.module!r} to modules"
            )
            continue
        problem = _call_problem(f)
        if problem:
            yield f"functions: {f.call}: {problem}"
    names = Counter([PROXY, *(f.source for f in settings.functions)])
    for name in (name for name, times in names.items() if times > 1):
        yield f"functions: two scores are called {name!r}; give one of them another `name`"


def _call_problem(f: RewardFunction) -> str | None:
    file = source_file(f.module)
    if file is None:
        return MISSING.format(f.module)
    try:
        functions = _functions(file)
    except (SyntaxError, ValueError) as error:
        return f"{file} is not Python that can be read ({error})"
    if f.function not in functions:
        return f"{file} defines no such function{nearest(f.function, functions)}"
    if problem := _signature_problem(functions[f.function].args, set(f.arguments)):
        return problem
    if f.module == CHECKS:
        from pipeline.rollout.checks import argument_problem  # ours: no torch, and no side effects

        return argument_problem(f.function, f.arguments)
    return None


def _functions(file: Path) -> dict[str, ast.FunctionDef]:
    """The public functions that stand at the top level of a file."""
    nodes = ast.parse(file.read_bytes()).body
    return {n.name: n for n in nodes if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")}


def _signature_problem(signature: ast.arguments, given: set[str]) -> str | None:
    """Why `function(prompt, text, stopped, answer, **given)` would fail, or None."""
    positional = [a.arg for a in (*signature.posonlyargs, *signature.args)]
    if len(positional) < len(GIVEN) and not signature.vararg:
        return f"it takes {len(positional)} positional arguments, but gets {len(GIVEN)}: {', '.join(GIVEN)}"
    named = [a.arg for a in (*signature.args, *signature.kwonlyargs) if a.arg not in positional[: len(GIVEN)]]
    unknown = sorted(given - set(named))
    if unknown and not signature.kwarg:
        return f"arguments: it takes no {unknown[0]!r}{nearest(unknown[0], named)}"
    with_default = positional[len(positional) - len(signature.defaults) :] if signature.defaults else []
    with_default += [a.arg for a, d in zip(signature.kwonlyargs, signature.kw_defaults, strict=True) if d is not None]
    required = [a for a in (*positional[len(GIVEN) :], *(a.arg for a in signature.kwonlyargs)) if a not in with_default]
    missing = [a for a in required if a not in given]
    return f"arguments: {', '.join(missing)} must be given" if missing else None
