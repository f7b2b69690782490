"""Answers are kept on the disk while they are drawn, so that a row that was killed draws on where it stopped.

    kept = Portions(workspace.working("drawn"), ranks, workspace.say)
    rollout = kept.sample("rejection", sampler, prompts)

A portion is a file of samples whose name ends in the digest of what it holds. What one portion holds follows from the
prompts and the number of samples alone, so that a row draws the same answers to the same bits wherever it was stopped.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.data.records import Sample
from pipeline.flow.artifacts import sha256_bytes, sha256_file, sync
from pipeline.rollout.collect import EncodedPrompts, Rollout, Sampler, figures
from pipeline.rollout.engine import Progress

SAMPLES = 4096  # in a portion: what a killed row draws again at most


class Portions:
    """`directory` is the row's own. What another number of ranks drew is not used: its sums are of another order."""

    def __init__(self, directory: Path, ranks: Any, say: Callable[[str], None], size: int = SAMPLES) -> None:
        self.directory, self.ranks, self.say, self.size = directory, ranks, say, size
        self.world = ranks.world if ranks is not None else 1
        self.main = ranks is None or ranks.main

    def sample(
        self,
        name: str,
        sampler: Sampler,
        prompts: EncodedPrompts,
        *,
        iteration: int = 0,
        progress: Progress | None = None,
    ) -> Rollout:
        """`sampler.sample` of all prompts, not scored. `name` tells its portions from those of other calls of the row.

        Every rank must call it.
        """
        each = max(1, self.size // sampler.settings.samples)
        total = len(prompts) * sampler.settings.samples
        samples: list[Sample] = []
        for number, at in enumerate(range(0, len(prompts), each)):
            part = prompts.take(range(at, min(at + each, len(prompts))))
            stem = f"{re.sub('[^a-z0-9.@-]', '_', name)}.{number:06d}.of{self.world}"
            found = self._stored(stem, part, sampler.settings.samples)
            if found is None:
                done = len(samples)
                shown = (lambda n, _, done=done: progress(done + n, total)) if progress else None
                found = sampler.sample(part, iteration=iteration, ranks=self.ranks, progress=shown).samples
                if self.main:
                    self._store(stem, found)
            samples += found
        return Rollout(samples, prompts.ids, figures(samples))

    def _stored(self, stem: str, prompts: EncodedPrompts, each: int) -> list[Sample] | None:
        """The samples of a portion on the disk; None, on all ranks, where it is not there or not as it was written."""
        file = self._find(stem) if self.main else None
        if self.ranks is not None:
            file = self.ranks.gather(file)[0]
        if file is None:
            return None
        return [
            Sample(prompts.prompts[i // each], i % each, text, tuple(ids), tuple(logprobs), stopped, {}, tuple(raw))
            for i, (text, ids, logprobs, raw, stopped) in enumerate(map(json.loads, (self.directory / file).open()))
        ]

    def _find(self, stem: str) -> str | None:
        for path in sorted(self.directory.glob(f"{stem}.*.jsonl")) if self.directory.is_dir() else []:
            if path.name == f"{stem}.{sha256_file(path)}.jsonl":
                return path.name
            self.say(f"{path} is not as it was written: its answers are drawn again")
            path.unlink()
        return None

    def _store(self, stem: str, samples: list[Sample]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        rows = ([s.text, s.ids, s.logprobs, s.raw_logprobs, s.stopped] for s in samples)
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path = self.directory / f"{stem}.{sha256_bytes(text)}.jsonl"
        temporary = self.directory / f".tmp-{stem}"
        temporary.write_bytes(text)
        sync(temporary)
        os.replace(temporary, path)
