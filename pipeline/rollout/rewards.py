"""What answers are rewarded for, as `RewardSettings` says it: sources of scores, and the one number they come to.

    rewards = Rewards.open(inputs.reward, config.reward, inputs.policy.lineage, config.train.token_budget)
    Sampler(..., reward=rewards)                     # samples with scores by source, and "proxy" for all together
    scores = rewards.total(rollout.samples, ranks)   # what PPO trains on
    rewards.state(), rewards.load_state(state)       # running statistics, JSON

Sources are named: a reward model by its row ("reward", "reward@b"), a function by its name. "proxy" is

    combine(weight * model, ...) + sum(weight * function)        (mean, worst, uncertainty: `algo.rewards.combine`)

and `total` makes of it, in this order: running normalisation, clipping, length terms, missing ends, whitening
(`algo.rewards.shape_scores`). So the terms that a plan states in numbers stand on the normalised scale, and an
unfinished answer gets exactly `unfinished_score` unless scores are whitened.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from pipeline.algo.advantages import moments
from pipeline.algo.rewards import RunningMoments, combine, shape_scores, whitened
from pipeline.data.records import Sample
from pipeline.flow.artifacts import RewardModel
from pipeline.flow.config import nearest
from pipeline.flow.errors import Damaged, NonFinite, UserError
from pipeline.llama.heads import ScalarModel
from pipeline.rollout.reward import Ids, Reward, open_reward, score_ids, score_texts
from pipeline.rollout.reward_settings import PROXY, RewardFunction, RewardSettings

BOUNDARY = ("tokenizer", "template")  # facts that agree where ids may cross
SHOWN = 60  # characters of an answer in a message


@dataclass(frozen=True)
class ModelSource:
    """A reward model. `shares_ids`: its tokenizer and template are the policy's, else texts are rendered again."""

    name: str
    weight: float
    reward: Reward
    shares_ids: bool

    def scores(self, samples: Sequence[Sample], prompt_ids: Sequence[Ids] | None, token_budget: int) -> list[float]:
        """NonFinite where one is not a number."""
        if self.shares_ids:
            found = score_ids(self.reward, samples, prompt_ids, token_budget)
        else:
            found = score_texts(self.reward, samples, token_budget)
        for sample, score in zip(samples, found, strict=True):
            if not abs(score) < float("inf"):
                raise NonFinite(f"reward model {self.name}, {_where(sample)}: its score is {score}")
        return found


@dataclass(frozen=True)
class FunctionSource:
    """A Python function that a plan names."""

    name: str
    weight: float
    call: str
    function: Callable[..., Any]
    arguments: Mapping[str, Any]

    @classmethod
    def open(cls, settings: RewardFunction) -> FunctionSource:
        """Import it. UserError where its module fails, or where the function was only imported there."""
        try:
            function = getattr(import_module(settings.module), settings.function)
        except Exception as error:
            raise UserError(f"reward function {settings.call}: cannot be imported: {_words(error)}") from error
        if getattr(function, "__module__", None) != settings.module:
            raise UserError(
                f"reward function {settings.call}: is defined in {getattr(function, '__module__', None)!r}, not in the "
                "module that the plan allows; name and allow that one"
            )
        return cls(settings.source, settings.weight, settings.call, function, settings.arguments)

    def scores(self, samples: Sequence[Sample]) -> list[float]:
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> float:
        prompt, own = sample.prompt, deepcopy(dict(self.arguments))  # a function may change what it is given
        try:
            value = self.function(prompt.messages, sample.text, sample.stopped, prompt.answer, **own)
        except (Exception, SystemExit) as error:
            raise UserError(f"{self._at(sample)}: {_words(error)}") from error
        score = _number(value)
        if not abs(score) < float("inf"):
            raise UserError(f"{self._at(sample)}: expected a finite number, but it returned {_shown(value)}")
        return score

    def _at(self, sample: Sample) -> str:
        return f"reward function {self.call}, {_where(sample)}"


class Rewards:
    """All sources of reward of a row. A `Scorer`."""

    def __init__(
        self,
        models: Sequence[ModelSource],
        functions: Sequence[FunctionSource],
        settings: RewardSettings,
        token_budget: int = 8192,
    ) -> None:
        """UserError where there is no source, two have one name, or a weight is that of no reward model."""
        self.models, self.functions = list(models), list(functions)
        self.settings, self.token_budget = settings, token_budget
        self.running = RunningMoments()
        self.digests: dict[str, str] = {}  # of the reward models, by what their scores are called
        self._check_names()

    @classmethod
    def open(
        cls,
        models: Sequence[RewardModel],
        settings: RewardSettings,
        policy: Mapping[str, Any],
        token_budget: int = 8192,
    ) -> Rewards:
        """Open and prove every reward model, import every function.

        `policy` holds the digests `tokenizer` and `template` of the policy that answers (its artifact's lineage):
        reward models with the same ones read its ids, for all others the texts are rendered again.
        """
        sources = []
        for artifact in models:
            name = str(artifact.meta.get("row") or artifact.meta.get("source") or artifact.kind)
            shared = all(policy.get(fact) and policy.get(fact) == artifact.lineage.get(fact) for fact in BOUNDARY)
            sources.append(ModelSource(name, settings.weights.get(name, 1.0), open_reward(artifact), shared))
        made = cls(sources, [FunctionSource.open(f) for f in settings.functions], settings, token_budget)
        several = len(made.names) > 1
        made.digests = {s.name if several else PROXY: m.digest for s, m in zip(sources, models, strict=True)}
        return made

    @property
    def names(self) -> list[str]:
        """Every source, as its score is called."""
        return [model.name for model in self.models] + [function.name for function in self.functions]

    @property
    def networks(self) -> list[ScalarModel]:
        """The frozen reward models in memory."""
        return [source.reward.model for source in self.models]

    @property
    def rendered_again(self) -> list[str]:
        """Reward models that read texts rendered anew, because their tokenizer or template is not the policy's."""
        return [source.name for source in self.models if not source.shares_ids]

    def score(
        self, samples: Sequence[Sample], prompt_ids: Sequence[Ids] | None = None, token_budget: int | None = None
    ) -> list[dict[str, float]]:
        """Raw scores of each sample by source where there are several, together under "proxy"; as `Scorer` says.

        Raises NonFinite for a reward model's score, UserError for a function's, that is not a finite number.
        """
        budget = token_budget or self.token_budget
        found = {source.name: source.scores(samples, prompt_ids, budget) for source in self.models}
        found |= {source.name: source.scores(samples) for source in self.functions}
        return [
            {PROXY: together, **({name: scores[i] for name, scores in found.items()} if len(found) > 1 else {})}
            for i, together in enumerate(self.together(found, len(samples)))
        ]

    def total(self, samples: Sequence[Sample], ranks: Any = None) -> list[float]:
        """What each sample is trained on; updates the running statistics.

        `samples` are those of all ranks, as a `Rollout` holds them. With `ranks` everyone takes the first rank's sums,
        so that statistics stay equal to the last bit on unequal machines. UserError for a sample without scores.
        """
        for sample in samples:
            if PROXY not in sample.scores:
                raise UserError(f"{_where(sample)}: it has no score {PROXY!r}; score it first")
        settings = self.settings
        scores_N = torch.tensor([s.scores[PROXY] for s in samples], dtype=torch.float64)
        if settings.normalise == "running":
            totals = moments(scores_N, torch.ones_like(scores_N))
            if ranks is not None:
                totals = torch.tensor(ranks.gather(totals.tolist())[0], dtype=torch.float64)
            self.running = self.running.update(totals)
            scores_N = self.running.normalise(scores_N)
        overlong = settings.overlong
        scores_N = shape_scores(
            scores_N,
            torch.tensor([len(s.ids) for s in samples], dtype=torch.float64),
            torch.tensor([s.stopped for s in samples], dtype=torch.bool),
            clip=settings.clip,
            token_penalty=settings.token_penalty,
            overlong=(overlong.budget, overlong.buffer, overlong.penalty) if overlong else None,
            unfinished_score=settings.unfinished_score,
            unfinished_penalty=settings.unfinished_penalty,
        )
        if settings.whiten:
            scores_N = whitened(scores_N, shift_mean=settings.shift_mean)
        return [float(score) for score in scores_N]

    def state(self) -> dict[str, float]:
        """Running statistics; empty where scores keep their stored scale. JSON keeps them to the last bit."""
        return self.running.state() if self.settings.normalise == "running" else {}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Go on from `state()`. Damaged where it is not what these settings gave."""
        if set(state) != set(self.state()):
            raise Damaged(
                f"the rewards' running statistics hold {sorted(self.state())}, but stored are {sorted(state)}"
            )
        if state:
            self.running = RunningMoments.from_state(state)

    def together(self, found: Mapping[str, Sequence[float]], size: int) -> list[float]:
        """The combined score of each of `size` samples from their scores by source."""
        total_N = torch.zeros(size, dtype=torch.float64)
        if self.models:
            weighted = [[source.weight * x for x in found[source.name]] for source in self.models]
            scores_MN = torch.tensor(weighted, dtype=torch.float64).reshape(len(self.models), size)
            total_N = combine(scores_MN, self.settings.combine, self.settings.uncertainty)
        for source in self.functions:
            total_N = total_N + source.weight * torch.tensor(found[source.name], dtype=torch.float64)
        return [float(x) for x in total_N]

    def _check_names(self) -> None:
        names = self.names
        if not names:
            raise UserError(
                "nothing rewards an answer: wire a reward model (reward: reward.model), or set reward.functions"
            )
        for name in names:
            if name == PROXY or names.count(name) > 1:
                raise UserError(
                    f"two scores are called {name!r}: give the function another `name`, or the reward model's row "
                    "another label"
                )
        known = [source.name for source in self.models]
        for name in self.settings.weights:
            if name not in known:
                raise UserError(f"reward.weights: no reward model is of row {name!r}{nearest(name, known)}")


def _where(sample: Sample) -> str:
    text = sample.text if len(sample.text) <= SHOWN else f"{sample.text[:SHOWN]}..."
    return f"prompt {sample.prompt.id!r}, answer {sample.index} {text!r}"


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _number(value: Any) -> float:
    """NaN for what is no number, or larger than any float."""
    try:
        return float(value) if isinstance(value, numbers.Real) else float("nan")
    except OverflowError:
        return float("nan")


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.60}"
    except Exception:  # somebody else's repr; and Python writes no whole number of more than 4,300 digits
        return f"a value of type {type(value).__name__}"
