"""A reward model as its users see it: opened, proven to be the one that was trained, on its normalised scale.

A classifier whose head was lost on the way still opens, with a fresh random head, in many libraries. Here the
stage that trains it stores the scores of a few answers beside the weights (`probe.json`), and whoever opens it
reproduces them before the first use.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol

from pipeline.data.chat import ChatFormat
from pipeline.data.forest import Group, build
from pipeline.data.groups import answers, continuations
from pipeline.data.records import Sample
from pipeline.flow.artifacts import RewardModel, read_object
from pipeline.flow.errors import Damaged
from pipeline.llama.heads import ScalarModel, at_last
from pipeline.llama.open import open_classifier
from pipeline.rollout.scoring import frozen, score_samples

PROBE = "probe.json"
PROBED = 8  # groups whose scores are stored
Ids = Sequence[int]


class Scorer(Protocol):
    """Whoever gives samples their scores by source; "proxy" is the one that counts."""

    def score(
        self, samples: Sequence[Sample], prompt_ids: Sequence[Ids] | None = None, token_budget: int | None = None
    ) -> list[dict[str, float]]:
        """Scores of each sample.

        prompt_ids    ids of the prompts that the samples answer, the same number of samples for each, in order; None
                      renders the prompts of the samples
        token_budget  tokens a forward pass at most; it changes no score
        """
        ...


@dataclass(frozen=True)
class Reward:
    """`model` gives raw scores with the scale already folded into its head; `shift` moves their mean to 0."""

    model: ScalarModel
    chat: ChatFormat
    shift: float

    def score(
        self, samples: Sequence[Sample], prompt_ids: Sequence[Ids] | None = None, token_budget: int | None = None
    ) -> list[dict[str, float]]:
        """A `Scorer` by itself, of samples whose ids are of this model's own tokenizer and template."""
        return [{"proxy": score} for score in score_ids(self, samples, prompt_ids, token_budget or 8192)]


def open_reward(artifact: RewardModel) -> Reward:
    """Open and prove. Raises Damaged when the stored scores are not reproduced to 1e-5."""
    opened = open_classifier(artifact)
    model = ScalarModel(opened.model).requires_grad_(False)
    verify_probe(model, artifact.path)
    return Reward(model, ChatFormat(opened.tokenizer), float(artifact.lineage.get("shift", 0.0)))


def write_probe(model: ScalarModel, groups: Sequence[Group], directory: Path) -> None:
    """Scores of the answers in the first few groups, beside the weights that give them."""
    chosen = list(groups[:PROBED])
    scores = raw_scores(model, chosen)
    body = {
        "about": "scores of these answers by this model; reproduced to 1e-5 by whoever opens it",
        "groups": [[list(map(int, segment.ids)) for segment in group] for group in chosen],
        "scores": scores,
    }
    (directory / PROBE).write_text(json.dumps(body) + "\n")


def verify_probe(model: ScalarModel, directory: Path) -> None:
    path = directory / PROBE
    if not path.is_file():
        raise Damaged(f"{path}: missing, so nothing proves that the reward head was loaded and not initialised")
    body = read_object(path, Damaged)
    try:
        found = raw_scores(model, [continuations(ids[0], ids[1:]) for ids in body["groups"]])
        worst = max((abs(a - b) for a, b in zip(found, body["scores"], strict=True)), default=0.0)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise Damaged(f"{path}: holds no groups of ids that this model scores ({error!r})") from error
    if not worst <= 1e-5:
        raise Damaged(
            f"{directory}: the opened reward model gives other scores than it was stored with (off by {worst:.3g}, "
            f"allowed 1e-5; see {PROBE}): its head or its weights are not those that were trained"
        )


def score_ids(
    reward: Reward, samples: Sequence[Sample], prompt_ids: Sequence[Ids] | None, token_budget: int
) -> list[float]:
    """Normalised scores of answers by their ids, which must be of the reward model's tokenizer and template."""
    if prompt_ids is None:
        return _scores(reward, samples, [s.ids for s in samples], token_budget)
    if not samples:
        return []
    k = len(samples) // len(prompt_ids)
    answers_ids = [[s.ids for s in samples[at : at + k]] for at in range(0, len(samples), k)]
    return _flat(reward, score_samples(reward.model, prompt_ids, answers_ids, token_budget))


def score_texts(reward: Reward, samples: Sequence[Sample], token_budget: int) -> list[float]:
    """Normalised scores of answers as texts, rendered in the reward model's own format."""
    texts = reward.chat.completions_ids([s.text for s in samples], finished=False)
    ends = [[reward.chat.end_id] if s.stopped else [] for s in samples]
    return _scores(reward, samples, [text + end for text, end in zip(texts, ends, strict=True)], token_budget)


def _scores(reward: Reward, samples: Sequence[Sample], ids: Sequence[Ids], token_budget: int) -> list[float]:
    """Scores of answers, given as ids, behind their prompts: each rendered and computed once for a run of samples."""
    runs = [list(run) for _, run in groupby(range(len(samples)), lambda i: samples[i].prompt.messages)]
    prompts = reward.chat.prompts_ids([samples[run[0]].prompt.messages for run in runs])
    return _flat(reward, score_samples(reward.model, prompts, [[ids[i] for i in run] for run in runs], token_budget))


def _flat(reward: Reward, scores: Sequence[Sequence[float]]) -> list[float]:
    return [float(score) + reward.shift for group in scores for score in group]


def raw_scores(model: ScalarModel, groups: Sequence[Group]) -> list[float]:
    """The head's output at the last token of every answer of these groups, computed in one pass without dropout."""
    if not groups:
        return []
    device = next(model.parameters()).device
    forest = build(groups).to(device)
    with frozen(model):
        scores_S = at_last(model(forest), forest)
    return [float(x) for x in scores_S[answers(forest)]]
