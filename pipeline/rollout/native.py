"""The native engine: decoding over our core or transformers' own models, many sequences at once.

Prompts enter in batches, longest first, each computed once for all of its samples. All active rows then
advance one token a step. Rows whose answer has ended wait, masked, until enough of them can be replaced by
waiting prompts in one batch, or, when none wait, until it pays to close the gaps; doing either at every step
costs more than the idle rows. Beam search has a loop of its own (`pipeline/rollout/beams.py`).

Shapes: R rows of the cache, N active rows, P prompts of a batch, K samples a prompt, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.llama import decode, virtual
from pipeline.llama.choosing import Chooser, seen_tokens
from pipeline.rollout import noise
from pipeline.rollout.beams import search
from pipeline.rollout.engine import Generated, Progress, SamplingSettings, ToText, Usage, check_prompts, require_text
from pipeline.rollout.noise import NoiseKey

REFILL = 12  # a twelfth of the rows idle: let waiting prompts in
COMPACT = 6  # a sixth of the active rows idle and nobody waits: close the gaps
SECONDS_BETWEEN_REPORTS = 0.5


@dataclass(frozen=True, slots=True)
class _Waiting:
    """Samples first .. first + count - 1 of one prompt: they enter together."""

    prompt: int
    first: int
    count: int


class NativeEngine:
    """Samples from `model`, which stays the caller's: weights are read anew at every call.

    rows            most sequences at once; fewer where `cache_bytes` holds fewer
    cache_bytes     memory for keys and values, kept between calls (`release()` gives it back)
    prefill_tokens  prompt tokens of one batch
    linear_dtype    computes the linear layers in bfloat16, say; None keeps the model's own precision
    to_text         texts of answers, for `stop_strings`
    """

    def __init__(
        self,
        model: nn.Module,
        stop_ids: Sequence[int],
        pad_id: int,
        *,
        rows: int = 256,
        cache_bytes: int = 1 << 30,
        prefill_tokens: int = 4096,
        linear_dtype: torch.dtype | None = None,
        to_text: ToText | None = None,
    ) -> None:
        self.model = model
        self.stop_ids = tuple(stop_ids)
        self.pad_id = pad_id
        self.rows, self.cache_bytes, self.prefill_tokens = rows, cache_bytes, prefill_tokens
        self.linear_dtype, self.to_text = linear_dtype, to_text
        self.usage = Usage()
        self._cache: decode.SlotCache | None = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        key: NoiseKey,
        progress: Progress | None = None,
        *,
        names: Sequence[int | str] | None = None,
    ) -> list[list[Generated]]:
        """See `Engine.generate`. Raises UserError where a prompt is empty or does not fit the model."""
        if not prompts:
            return []
        require_text(self.to_text, settings)
        config, virtual_tokens = decode.base_model(self.model).config, virtual.count(self.model)
        columns = check_prompts(prompts, settings, config, virtual_tokens)
        beams = settings.num_beams
        with decode.sampling_mode(self.model):
            cache = self._room(columns, len(prompts) * max(settings.samples, beams), at_least=beams)
            runner = decode.new_runner(self.model, cache, self.linear_dtype)
            if beams > 1:
                return search(self, runner, prompts, settings, progress)
            names = noise.content_names(prompts) if names is None else names
            streams_PK = noise.streams(key, names, settings.samples)
            return _Session(self, runner, prompts, settings, streams_PK, progress).run()

    def release(self) -> None:
        """Give the cache's memory back."""
        self._cache = None

    def _room(self, columns: int, sequences: int, at_least: int = 1) -> decode.SlotCache:
        affordable = self.cache_bytes // decode.row_bytes(self.model, columns)
        rows = max(at_least, min(self.rows, sequences, affordable))
        like = next(decode.base_model(self.model).parameters())
        cache = self._cache
        if cache is None or not cache.fits(rows, columns, like):
            self._cache = None  # before the next one is allocated
            self._cache = cache = decode.new_cache(self.model, rows, columns)
        return cache


class _Session:
    """One call of generate(): the state of all rows, and the loop."""

    def __init__(
        self,
        engine: NativeEngine,
        runner: decode.Runner,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        streams_PK: noise.Words,
        progress: Progress | None,
    ) -> None:
        self.engine, self.runner, self.prompts, self.settings = engine, runner, prompts, settings
        self.streams_PK, self.progress = streams_PK, progress
        rows, new = runner.cache.rows, settings.max_new_tokens
        self.device = runner.cache.row_R.device

        def room(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        # One column more than an answer can have: rows that have ended keep writing, after their end.
        self.ids_RN = room(rows, new + 1)
        self.logprobs_RN = room(rows, new + 1, dtype=torch.float32)
        self.raw_RN = room(rows, new + 1, dtype=torch.float32)
        self.noise_RN = room(rows, new + 1, dtype=torch.float32)
        self.tokens_R = room(rows)  # the token to be fed next
        self.positions_R = room(rows)  # and its position
        self.count_R = room(rows)  # new tokens so far
        self.alive_R = room(rows, dtype=torch.bool)
        self.stopped_R = room(rows, dtype=torch.bool)  # ended by a stop token or a stop string
        self.seen_RV: Tensor | None = None  # tokens of prompt and answer, where repetition is penalised
        self.stop_ids = torch.tensor(engine.stop_ids, dtype=torch.int64, device=self.device)
        self.choose = Chooser(
            settings.temperature,
            settings.top_k,
            settings.top_p,
            settings.min_p,
            settings.repetition_penalty,
            self.stop_ids,
        )
        self.bars = bool(settings.min_new_tokens and engine.stop_ids)
        self.owner: list[tuple[int, int] | None] = [None] * rows  # (prompt, sample) of each row in use
        self.active = 0  # rows 0 .. active - 1 are stepped
        self.columns = 0  # one more than any living row's position
        self.results: list[list[Generated | None]] = [[None] * settings.samples for _ in prompts]
        self.done, self.total = 0, len(prompts) * settings.samples
        self.reported = time.monotonic()

    def run(self) -> list[list[Generated]]:
        rows = self.runner.cache.rows
        waiting = self._queue(rows)
        while waiting or self.active:
            if waiting:
                self._admit(waiting)
            idle = 0
            while self.active:
                before, idle = idle, self._idle()
                if idle != before:  # an ended row may have been the longest
                    self._measure()
                free = rows - self.active + idle
                if waiting and (free >= max(waiting[-1].count, rows // REFILL) or idle == self.active):
                    break
                if not waiting and idle * COMPACT >= self.active:
                    break
                self._step()
            self._harvest()
            if not waiting:
                self._compact()
        return [[g for g in group if g is not None] for group in self.results]

    def _queue(self, rows: int) -> list[_Waiting]:
        """Waiting samples, the next one last. Longest prompts first: neighbours are of similar length."""
        samples = self.settings.samples
        order = sorted(range(len(self.prompts)), key=lambda p: (len(self.prompts[p]), -p))
        return [
            _Waiting(p, first, min(rows, samples - first)) for p in order for first in reversed(range(0, samples, rows))
        ]

    # -- one step of all active rows --

    def _step(self) -> None:
        n = self.active
        logits = self.runner.step(self.tokens_R[:n], self.positions_R[:n], self.columns)
        self.positions_R[:n] += self.alive_R[:n]
        self.engine.usage.steps += 1
        self._take(logits, slice(n))
        self.columns += 1

    def _measure(self) -> None:
        """The columns that living rows need. Ended rows read fewer than they hold, which harms nobody."""
        n = self.active
        self.columns = int((self.positions_R[:n] * self.alive_R[:n]).max()) + 1 if n else 0

    def _take(self, logits_NV: Tensor, rows_N: Tensor | slice) -> None:
        """Draw the next token of each row, write it down, and note which rows have ended."""
        s = self.settings
        at_N = self.runner.cache.row_R[rows_N]  # their numbers; a slice reads and writes the state in place
        count = self.count_R[rows_N]
        early = count < s.min_new_tokens if self.bars else None
        seen = None if self.seen_RV is None else self.seen_RV[rows_N]
        ids, logprobs, raw = self.choose(logits_NV, self.noise_RN[at_N, count], early, seen)
        self.ids_RN[at_N, count] = ids
        self.logprobs_RN[at_N, count] = logprobs
        self.raw_RN[at_N, count] = raw
        self.tokens_R[rows_N] = ids
        if self.seen_RV is not None:
            self.seen_RV[at_N, ids] = True
        alive = self.alive_R[rows_N]
        count = count + alive
        self.count_R[rows_N] = count
        stopped = torch.isin(ids, self.stop_ids)
        if s.stop_strings:
            stopped |= self._says_stop(at_N, count, alive & ~stopped)
        self.stopped_R[rows_N] |= stopped & alive
        self.alive_R[rows_N] = alive & ~(stopped | (count >= s.max_new_tokens))

    def _says_stop(self, rows_N: Tensor, count_N: Tensor, asked_N: Tensor) -> Tensor:
        """[N] whether the text of an answer holds a stop string; of its own ids alone, whatever stands beside it."""
        asked = asked_N.nonzero()[:, 0]
        counts = count_N[asked].tolist()
        answers = [ids[:n] for ids, n in zip(self.ids_RN[rows_N[asked]].tolist(), counts, strict=True)]
        texts = self.engine.to_text(answers)  # type: ignore[misc]  # required with stop strings
        said = [any(stop in text for stop in self.settings.stop_strings) for text in texts]
        found = torch.zeros_like(asked_N)
        found[asked] = torch.tensor(said, dtype=torch.bool, device=self.device)
        return found

    def _idle(self) -> int:
        return self.active - int(self.alive_R[: self.active].sum())

    # -- rows that leave, rows that enter --

    def _harvest(self) -> None:
        """Take the answers of ended rows out and free their rows."""
        ended = [r for r in (~self.alive_R[: self.active]).nonzero()[:, 0].tolist() if self.owner[r] is not None]
        if not ended:
            return
        at = torch.tensor(ended, device=self.device)
        counts = self.count_R[at].tolist()
        longest = max(counts)
        columns = [x[at, :longest].tolist() for x in (self.ids_RN, self.logprobs_RN, self.raw_RN)]
        stopped = self.stopped_R[at].tolist()
        for row, n, end, ids, logprobs, raw in zip(ended, counts, stopped, *columns, strict=True):
            prompt, sample = self.owner[row]  # type: ignore[misc]
            self.owner[row] = None
            self.results[prompt][sample] = Generated(
                prompt, sample, tuple(ids[:n]), tuple(logprobs[:n]), tuple(raw[:n]), end
            )
        self.positions_R[at] = 0  # free rows are stepped along at little cost
        self.done += len(ended)
        self.engine.usage.new_tokens += sum(counts)
        self._report()

    def _report(self) -> None:
        now = time.monotonic()
        due = self.done == self.total or now - self.reported >= SECONDS_BETWEEN_REPORTS
        if self.progress is not None and due:
            self.reported = now
            self.progress(self.done, self.total)

    def _compact(self) -> None:
        """Move the last living rows into the gaps before them, so that the active rows are the living
        ones."""
        alive = self.alive_R[: self.active].tolist()
        living = sum(alive)
        gaps = [r for r in range(living) if not alive[r]]
        movers = [r for r in range(living, self.active) if alive[r]]
        if gaps:
            source = torch.tensor(movers, device=self.device)
            target = torch.tensor(gaps, device=self.device)
            self.runner.cache.move(source, target, self.columns)
            for state in (self.ids_RN, self.logprobs_RN, self.raw_RN, self.noise_RN):
                state[target] = state[source]
            for state in (self.tokens_R, self.positions_R, self.count_R, self.alive_R, self.stopped_R):
                state[target] = state[source]
            if self.seen_RV is not None:
                self.seen_RV[target] = self.seen_RV[source]
            for old, new in zip(movers, gaps, strict=True):
                self.owner[new], self.owner[old] = self.owner[old], None
        self.active = living
        self._measure()

    def _admit(self, waiting: list[_Waiting]) -> None:
        """Let waiting samples into free rows, in batches of prompts, until one does not fit."""
        free = [r for r, owner in enumerate(self.owner) if owner is None]
        free.reverse()
        while waiting and len(free) >= waiting[-1].count:
            batch = [waiting.pop()]
            length = len(self.prompts[batch[0].prompt])
            room = len(free) - batch[0].count
            while (
                waiting
                and waiting[-1].count <= room
                and waiting[-1].count == batch[0].count
                and (len(batch) + 1) * length <= self.engine.prefill_tokens
            ):
                batch.append(waiting.pop())
                room -= batch[-1].count
            self._enter(batch, [[free.pop() for _ in range(w.count)] for w in batch])
        used = [r for r, owner in enumerate(self.owner) if owner is not None]
        self.active = used[-1] + 1 if used else 0
        self._measure()

    def _enter(self, batch: list[_Waiting], slots: list[list[int]]) -> None:
        """Compute the prompts of a batch, copy them into their rows, draw each sample's first token."""
        prompts = [self.prompts[w.prompt] for w in batch]
        lengths = [len(ids) for ids in prompts]
        ids = np.full((len(batch), max(lengths)), self.engine.pad_id, np.int64)
        for line, prompt in zip(ids, prompts, strict=True):
            line[: len(prompt)] = prompt
        drawn = np.stack([self.streams_PK[w.prompt, w.first : w.first + w.count] for w in batch])
        uniform = noise.uniforms(drawn.ravel(), 0, self.settings.max_new_tokens + 1)

        lengths_P = torch.tensor(lengths, device=self.device)
        slots_PK = torch.tensor(slots, device=self.device)
        ids_PT = torch.from_numpy(ids).to(self.device)
        logits = self.runner.prefill(ids_PT, lengths_P, slots_PK)
        self.engine.usage.prompt_tokens += sum(lengths)

        rows, samples = slots_PK.flatten(), slots_PK.shape[1]
        self.noise_RN[rows] = torch.from_numpy(uniform).to(self.device)
        self.positions_R[rows] = lengths_P.repeat_interleave(samples)
        self.count_R[rows] = 0
        self.alive_R[rows] = True
        self.stopped_R[rows] = False
        if self.settings.repetition_penalty != 1.0:
            seen_PV = seen_tokens(ids_PT, lengths_P, logits.shape[1])
            if self.seen_RV is None:
                self.seen_RV = seen_PV.new_zeros(self.runner.cache.rows, logits.shape[1])
            self.seen_RV[rows] = seen_PV.repeat_interleave(samples, 0)
        for w, own in zip(batch, slots, strict=True):
            for offset, row in enumerate(own):
                self.owner[row] = (w.prompt, w.first + offset)
        self._take(logits.repeat_interleave(samples, 0), rows)
