"""The store of samples: what was generated, with scores, so that nothing is generated twice.

One JSON object a line, each complete in itself; what it cost is in tokens, never in seconds:

    {"prompt": {"id": "p17", "messages": [{"role": "user", "content": "Hi"}]}, "index": 0, "text": "Hello.",
     "ids": [61, 12, 7], "logprobs": [-0.4, -0.1, -0.02], "stopped": true, "scores": {"proxy": 1.2},
     "raw_logprobs": [-0.6, -0.2, -0.05],
     "origin": {"policy": "5f3c...", "tokenizer": "9a01...", "template": "77be...", "row": "ppo", "seed": 0,
                "iteration": 3, "temperature": 0.7},
     "cost": {"prompt": 12, "new": 3}}

A row that draws iteration by iteration appends as it goes; one that reads a store scores it again, or takes the
scores that are there, and generates nothing:

    log = SampleLog(workspace.slot("samples") / "data.jsonl", main=ranks.main)
    origin = origin_of(inputs.policy, workspace.stage, workspace.seed, temperature=config.sampling.temperature)
    for iteration in range(config.iterations):
        rollout = sampler.sample(prompts.take(stream.batch(iteration)), iteration=iteration, ranks=ranks)
        log.append(recorded(rollout.samples, rollout.prompt_ids, replace(origin, iteration=iteration)))
    describe_samples(workspace, "samples", [origin])
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import sources
from pipeline.data.reader import Reader
from pipeline.data.records import Cost, Origin, Sample
from pipeline.flow.artifacts import Artifact, sync
from pipeline.flow.errors import Damaged
from pipeline.rollout.collect import figures
from pipeline.rollout.mining import NUL, by_prompt, score_of
from pipeline.rollout.reward import Reward, score_texts
from pipeline.rollout.scoring import score_samples

# --- what a record says of its origin -----------------------------------------------------------------------


def origin_of(policy: Artifact, row: str, seed: int, *, iteration: int = 0, temperature: float | None = None) -> Origin:
    """The origin of what a row draws from a policy that it opened."""
    digests = {name: policy.lineage.get(name) for name in ("tokenizer", "template")}
    return Origin(policy.digest, **digests, row=row, seed=seed, iteration=iteration, temperature=temperature)


def recorded(
    samples: Sequence[Sample], prompt_ids: Sequence[Sequence[int]], origin: Origin, *, first: int = 0
) -> list[Sample]:
    """Samples of a rollout (P prompts, K of each, in prompt order) with their origin and cost, numbered from `first`.

    The prompt was computed once for its K samples: the first of them bears it. A NUL in a text, which no reader of
    records accepts, becomes the sign for it; the ids are as drawn.
    """
    k = len(samples) // len(prompt_ids)
    costs = [Cost(prompt=len(prompt_ids[i // k]) if i % k == 0 else 0, new=len(s.ids)) for i, s in enumerate(samples)]
    return [
        replace(s, index=first + s.index, text=s.text.replace("\0", NUL), origin=origin, cost=cost)
        for s, cost in zip(samples, costs, strict=True)
    ]


def describe_samples(
    workspace: Any, slot: str, origins: Iterable[Origin | None], scored_by: Mapping[str, str] | None = None
) -> None:
    """Note beside a store who drew what is in it and, by source, the digest of who scored it.

    `tokenizer` and `template` are noted where they are the same for all, so that a row that takes ids from the store
    can ask for its own (`Stage.same_tokenizer`).
    """
    known = [o for o in dict.fromkeys(origins) if o]
    workspace.lineage(slot, policies=sorted({o.policy for o in known if o.policy}), scored_by=dict(scored_by or {}))
    for fact in ("tokenizer", "template"):
        found = {getattr(o, fact) for o in known}
        if len(found) == 1 and None not in found:
            workspace.lineage(slot, **{fact: found.pop()})


# --- writing and reading ------------------------------------------------------------------------------------


def write_samples(path: Path, samples: Iterable[Sample]) -> int:
    """Write samples one a line; returns how many."""
    return sources.write_jsonl(path, samples)


def read_samples(path: Path) -> list[Sample]:
    """All samples of a file. Raises UserError naming file and line where one is not as described above."""
    return list(sources.read_samples(path))


def read_stores(reader: Reader, stores: Sequence[Artifact]) -> list[Sample]:
    """All samples of the stores, in the order given. UserError naming every bad line.

    A round's store may hold those of the rounds before it: what was drawn once counts once, with the scores of all.
    """
    slots = ["samples"] if len(stores) == 1 else [f"samples-{i}" for i in range(1, len(stores) + 1)]
    found: dict[Any, Sample] = {}
    for slot, store in zip(slots, stores, strict=True):
        for sample in reader.read(slot, store, "samples"):
            drawn = (
                (sample.prompt.id, sample.origin, sample.index, sample.ids, sample.text)
                if sample.origin
                else len(found)
            )
            before = found.get(drawn)
            found[drawn] = replace(sample, scores={**before.scores, **sample.scores}) if before else sample
    return list(found.values())


class SampleLog:
    """A store that grows by whole iterations; what was appended is on the disk. Only the main rank writes.

    start   iterations that are done (their samples have `origin.iteration` below it): a row that continues keeps
            those and cuts off what a later, lost iteration has left, so that its file is that of a row that was never
            stopped. Damaged where samples of iteration start - 1 are not there.
    """

    def __init__(self, path: Path, *, start: int = 0, main: bool = True) -> None:
        self.path, self.main = path, main
        if main:
            keep = _end_of(path, start) if start else 0
            with path.open("r+b" if start else "wb") as stream:
                stream.truncate(keep)

    def append(self, samples: Sequence[Sample]) -> None:
        if not self.main:
            return
        with self.path.open("a", encoding="utf-8", newline="\n") as stream:
            stream.write("".join(sources.to_line(s) for s in samples))
        sync(self.path)


def _end_of(path: Path, start: int) -> int:
    """Bytes of the whole lines of iterations below `start`."""
    end, last = 0, -1
    if path.is_file():
        with path.open("rb") as stream:
            for line in stream:
                iteration = _iteration(line)
                if iteration is None or iteration >= start:
                    break
                end, last = end + len(line), iteration
    if last != start - 1:
        raise Damaged(
            f"{path}: ends in iteration {last}, but the row continues after iteration {start - 1}: samples are missing"
        )
    return end


def _iteration(line: bytes) -> int | None:
    """None for a line that was torn off."""
    try:
        return int((json.loads(line).get("origin") or {}).get("iteration", 0)) if line.endswith(b"\n") else None
    except ValueError:
        return None


def summary(samples: Sequence[Sample], drawn: Sequence[Sample], source: str) -> dict[str, float]:
    """What samples look like under the score `source`, and the tokens computed for those that the row drew itself."""
    scores = np.array([score_of(s, source) for s in samples], dtype=np.float64)
    costs = [s.cost for s in drawn if s.cost]
    return {
        **figures(samples),
        "score": float(scores.mean()),
        "score_std": float(scores.std()),
        "prompts": len({s.prompt.id for s in samples}),
        "drawn": len(drawn),
        "prompt_tokens": sum(c.prompt for c in costs),
        "sampled_tokens": sum(c.new for c in costs),
    }


# --- scoring ------------------------------------------------------------------------------------------------


def with_scores(samples: Sequence[Sample], source: str, scores: Sequence[float]) -> list[Sample]:
    """The same samples with one more score each; a score of that source is replaced."""
    return [replace(s, scores={**s.scores, source: float(score)}) for s, score in zip(samples, scores, strict=True)]


def shared_scores(
    samples: Sequence[Sample], score: Callable[[Sequence[Sample]], Sequence[float]], ranks: Any = None
) -> list[float]:
    """`score` of all samples, each called for on one rank alone: what it says of one needs not be the same twice (a
    judge that is asked, say), and ranks that chose by other scores would train on other answers."""
    mine = sorted(ranks.share([len(s.text) for s in samples])) if ranks is not None else range(len(samples))
    own = list(zip(mine, score([samples[i] for i in mine]), strict=True))
    found = {int(i): value for part in (ranks.gather(own) if ranks is not None else [own]) for i, value in part}
    return [found[i] for i in range(len(samples))]


def score_again(
    samples: Sequence[Sample],
    source: str,
    reward: Reward,
    lineage: Mapping[str, Any],
    *,
    token_budget: int,
    ranks: Any = None,
) -> list[Sample]:
    """Scores by a reward model under the name `source`, without generating anything.

    Where tokenizer and template of the sampler are those of the reward model (`lineage`), the very ids are scored,
    each prompt computed once for all of its samples; elsewhere the text is rendered again in the reward model's format.
    Every rank scores its share of the prompts and gets the scores of all.
    """
    places: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        places.setdefault(sample.prompt.id, []).append(i)
    by_prompt(samples)  # one id, one prompt
    groups = list(places.values())
    sizes = [sum(len(samples[i].ids) or len(samples[i].text) for i in group) for group in groups]
    mine = ranks.share(sizes) if ranks is not None else range(len(groups))
    shared = [groups[g] for g in mine]
    exact = [kept for group in shared if (kept := [i for i in group if shares_ids(samples[i], lineage)])]
    texts = [i for group in shared for i in group if not shares_ids(samples[i], lineage)]
    found = dict(zip((i for g in exact for i in g), _by_ids(samples, exact, reward, token_budget), strict=True))
    found |= dict(zip(texts, score_texts(reward, [samples[i] for i in texts], token_budget), strict=True))
    parts = ranks.gather(list(found.items())) if ranks is not None else [list(found.items())]
    everyone = {int(i): score for part in parts for i, score in part}
    return with_scores(samples, source, [everyone[i] for i in range(len(samples))])


def _by_ids(
    samples: Sequence[Sample], groups: Sequence[Sequence[int]], reward: Reward, token_budget: int
) -> list[float]:
    prompts = reward.chat.prompts_ids([samples[group[0]].prompt.messages for group in groups])
    raw = score_samples(reward.model, prompts, [[samples[i].ids for i in group] for group in groups], token_budget)
    return [score + reward.shift for group in raw for score in group]


def shares_ids(sample: Sample, lineage: Mapping[str, Any]) -> bool:
    """Whether the sample's ids mean the same to a model of that lineage: one tokenizer and one template."""
    origin = sample.origin
    if origin is None or not sample.ids or origin.tokenizer is None or origin.template is None:
        return False
    return (origin.tokenizer, origin.template) == (lineage.get("tokenizer"), lineage.get("template"))


def note_rendering(
    workspace: Any, slot: str, samples: Sequence[Sample], lineage: Mapping[str, Any], reader: str
) -> None:
    """Where ids of samples mean something else to their reader, so that texts are rendered again for it: say so, and
    note the digests of both sides beside the output."""
    foreign = [s for s in samples if not shares_ids(s, lineage)]
    if not foreign:
        return
    drawn = {(s.origin.tokenizer, s.origin.template) if s.origin else (None, None) for s in foreign}
    theirs = [{"tokenizer": t, "template": m} for t, m in sorted(drawn, key=str)]
    own = {fact: lineage.get(fact) for fact in ("tokenizer", "template")}
    workspace.lineage(slot, rendered_again={"samples": len(foreign), "drawn_with": theirs, "rendered_with": own})
    workspace.say(
        f"{len(foreign)} of {len(samples)} samples were drawn with another tokenizer or template than {reader} has: "
        "their texts are rendered again"
    )
