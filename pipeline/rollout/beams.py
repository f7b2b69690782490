"""Beam search over the slot cache, with the semantics of transformers' `generate(num_beams=..., do_sample=False)`.

A step scores every continuation of a prompt's B running beams by its summed log-prob and looks at the best
max(2, 1 + stop tokens) * B of them. Those among the first B that end (a stop token, a stop string, max_new_tokens)
compete, divided by length ** length_penalty, for the B places of finished beams; the best B that do not end run on.
A prompt is done when its running beams can no longer enter (`early_stopping`). The repetition penalty acts on
log-probs here, as in transformers, where sampling and greedy decoding penalise logits.

Prompts never meet: one that is done leaves, and its answer does not depend on the others.

Shapes: P prompts searched at once, B beams, K continuations looked at, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.llama import decode
from pipeline.llama.choosing import bar, penalise, seen_tokens
from pipeline.rollout.engine import Generated, Progress, SamplingSettings

if TYPE_CHECKING:
    from pipeline.rollout.native import NativeEngine

LOW = -1.0e9  # the score of a beam that is none: finite, so that it stays below every other at any length


@dataclass
class _Beams:
    """Beams of every prompt, best first; also used for continuations, K in place of B."""

    ids_PBN: Tensor
    raw_PBN: Tensor  # log-probs under the model's own distribution
    score_PB: Tensor
    length_PB: Tensor
    ended_PB: Tensor
    stopped_PB: Tensor

    def take(self, at_PB: Tensor) -> _Beams:
        """Of each prompt the beams `at_PB`."""
        wide = at_PB[:, :, None].expand(-1, -1, self.ids_PBN.shape[2])
        parts = (getattr(self, f.name) for f in fields(self))
        return _Beams(*(x.gather(1, wide if x.ndim == 3 else at_PB) for x in parts))

    def prompts(self, kept_P: Tensor) -> _Beams:
        return _Beams(*(getattr(self, f.name)[kept_P] for f in fields(self)))

    def beside(self, other: _Beams) -> _Beams:
        return _Beams(*(torch.cat((getattr(self, f.name), getattr(other, f.name)), 1) for f in fields(self)))


def search(
    engine: NativeEngine,
    runner: decode.Runner,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    progress: Progress | None,
) -> list[list[Generated]]:
    """The best `samples` beams of each prompt, best first."""
    waiting = sorted(range(len(prompts)), key=lambda p: (len(prompts[p]), -p))
    results: list[list[Generated]] = [[] for _ in prompts]
    done = 0
    while waiting:
        longest = len(prompts[waiting[-1]])
        size = min(runner.cache.rows // settings.num_beams, max(1, engine.prefill_tokens // longest))
        batch = [waiting.pop() for _ in range(min(size, len(waiting)))]
        for prompt, answers in _Search(engine, runner, {p: prompts[p] for p in batch}, settings).run():
            results[prompt] = answers
            done += settings.samples
            if progress is not None:
                progress(done, len(prompts) * settings.samples)
    return results


class _Search:
    def __init__(
        self,
        engine: NativeEngine,
        runner: decode.Runner,
        prompts: dict[int, Sequence[int]],
        settings: SamplingSettings,
    ) -> None:
        self.engine, self.runner, self.settings = engine, runner, settings
        self.device = runner.cache.row_R.device
        self.stop_ids = torch.tensor(engine.stop_ids, dtype=torch.int64, device=self.device)
        self.names = list(prompts)  # of the prompts still searched
        self.lengths_P = torch.tensor([len(ids) for ids in prompts.values()], device=self.device)
        longest = int(self.lengths_P.max())
        padded = [[*ids] + [engine.pad_id] * (longest - len(ids)) for ids in prompts.values()]
        self.ids_PT = torch.tensor(padded, device=self.device)
        self.running, self.finished = self._nothing(0.0), self._nothing(LOW)
        self.open_P = torch.ones(len(padded), dtype=torch.bool, device=self.device)
        self.seen_RV: Tensor | None = None

    def _nothing(self, first: float) -> _Beams:
        """Beams without tokens. Only the first may go on at first, or all would be the same."""
        shape = (len(self.names), self.settings.num_beams)
        score = torch.full(shape, LOW, device=self.device)
        score[:, 0] = first
        zeros = torch.zeros(*shape, self.settings.max_new_tokens, device=self.device)
        no = torch.zeros(shape, dtype=torch.bool, device=self.device)
        return _Beams(zeros.long(), zeros, score, no.long(), no, no)

    def run(self) -> Iterator[tuple[int, list[Generated]]]:
        """Yields (prompt, its answers) as prompts are done."""
        beams, usage = self.settings.num_beams, self.engine.usage
        rows = self.runner.cache.row_R[: len(self.names) * beams]
        logits = self.runner.prefill(self.ids_PT, self.lengths_P, rows.view(-1, beams))
        logits = logits.repeat_interleave(beams, 0)
        usage.prompt_tokens += int(self.lengths_P.sum())
        if self.settings.repetition_penalty != 1.0:
            self.seen_RV = seen_tokens(self.ids_PT, self.lengths_P, logits.shape[1]).repeat_interleave(beams, 0)
        new = 0
        while True:
            new += 1
            parent_PB = self._advance(logits, new)
            closed = self._closed(new)
            for p in closed.nonzero()[:, 0].tolist():
                yield self.names[p], self._answers(p)
            if closed.all():
                return
            self._leave_behind(parent_PB, ~closed)
            tokens = self.running.ids_PBN[:, :, new - 1].flatten()
            positions = (self.lengths_P + (new - 1)).repeat_interleave(beams)
            logits = self.runner.step(tokens, positions, int(positions.max()) + 1)
            usage.steps += 1

    def _advance(self, logits_RV: Tensor, new: int) -> Tensor:
        """Token number `new` of every beam. Returns [P, B] the beam that each running one continues."""
        s, beams = self.settings, self.settings.num_beams
        raw_RV = torch.log_softmax(logits_RV, -1)
        scores_RV = raw_RV if self.seen_RV is None else penalise(raw_RV, self.seen_RV, s.repetition_penalty)
        if new <= s.min_new_tokens and self.engine.stop_ids:
            scores_RV = bar(scores_RV, self.stop_ids, torch.ones(len(scores_RV), dtype=torch.bool, device=self.device))
        total = (self.running.score_PB.flatten()[:, None] + scores_RV).view(len(self.names), -1)
        looked_at = max(2, 1 + len(self.engine.stop_ids)) * beams
        top = total.topk(min(looked_at, total.shape[1]), -1)
        vocabulary = logits_RV.shape[1]
        parent_PK, token_PK = top.indices // vocabulary, top.indices % vocabulary

        found = self.running.take(parent_PK)
        found.ids_PBN[:, :, new - 1] = token_PK
        found.raw_PBN[:, :, new - 1] = raw_RV.view(len(self.names), -1).gather(1, top.indices)
        found.score_PB, found.length_PB = top.values, torch.full_like(parent_PK, new)
        found.stopped_PB = self._stops(found, new)
        found.ended_PB = found.stopped_PB | (new == s.max_new_tokens)

        self._finish(found, new)
        running_PK = found.score_PB.masked_fill(found.ended_PB, LOW)
        next_PB = running_PK.topk(beams, -1).indices
        self.running = found.take(next_PB)
        self.running.score_PB = running_PK.gather(1, next_PB)
        return parent_PK.gather(1, next_PB)

    def _stops(self, found: _Beams, new: int) -> Tensor:
        stopped = torch.isin(found.ids_PBN[:, :, new - 1], self.stop_ids)
        if self.settings.stop_strings:
            answers = found.ids_PBN[:, :, :new].flatten(0, 1).tolist()
            texts = self.engine.to_text(answers)  # type: ignore[misc]  # required with stop strings
            said = [any(stop in text for stop in self.settings.stop_strings) for text in texts]
            stopped |= torch.tensor(said, device=self.device).view_as(stopped)
        return stopped

    def _finish(self, found: _Beams, new: int) -> None:
        """Those that have ended, among the first B, compete with the ones finished before."""
        s = self.settings
        enters = found.ended_PB & (torch.arange(found.ended_PB.shape[1], device=self.device) < s.num_beams)
        score = (found.score_PB / new**s.length_penalty).masked_fill(~enters, LOW)
        both = self.finished.beside(replace(found, score_PB=score, ended_PB=enters))
        self.finished = both.take(both.score_PB.topk(s.num_beams, -1).indices)

    def _closed(self, new: int) -> Tensor:
        """[P] whether the finished beams are the answer."""
        s, finished = self.settings, self.finished
        at_best = s.max_new_tokens if s.early_stopping == "never" and s.length_penalty > 0 else new
        best_P = self.running.score_PB[:, 0] / at_best**s.length_penalty
        full_P = finished.ended_PB.all(-1)
        closed = full_P & (best_P <= finished.score_PB.min(-1).values)
        if s.early_stopping is True:
            closed |= full_P
        return closed if new < s.max_new_tokens else torch.ones_like(closed)

    def _leave_behind(self, parent_PB: Tensor, open_P: Tensor) -> None:
        """Drop the prompts that are done; give every running beam its parent's keys and values."""
        beams = self.settings.num_beams
        first_P = torch.arange(len(self.names), device=self.device) * beams
        source = (first_P[:, None] + parent_PB)[open_P].flatten()
        target = self.runner.cache.row_R[: len(source)]
        moved = source != target
        self.runner.cache.move(source[moved], target[moved], self.columns())
        kept = open_P.tolist()
        self.names = [name for name, keep in zip(self.names, kept, strict=True) if keep]
        self.lengths_P = self.lengths_P[open_P]
        self.running, self.finished = self.running.prompts(open_P), self.finished.prompts(open_P)
        if self.seen_RV is not None:
            self.seen_RV = self.seen_RV[source]
            last = self.running.length_PB.flatten()[:, None] - 1
            self.seen_RV.scatter_(1, self.running.ids_PBN.flatten(0, 1).gather(1, last), True)

    def columns(self) -> int:
        """Columns of the cache in use."""
        return int((self.lengths_P + self.running.length_PB[:, 0]).max())

    def _answers(self, p: int) -> list[Generated]:
        finished, answers = self.finished, []
        for k in range(self.settings.samples):
            n = int(finished.length_PB[p, k])
            ids, raw = finished.ids_PBN[p, k, :n].tolist(), finished.raw_PBN[p, k, :n].tolist()
            stopped = bool(finished.stopped_PB[p, k])
            answers.append(Generated(self.names[p], k, tuple(ids), (0.0,) * n, tuple(raw), stopped))
            self.engine.usage.new_tokens += n
        return answers
