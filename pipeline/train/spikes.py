"""What the loop remembers of losses to tell a spike by; it is part of every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.algo.spikes import is_spike
from pipeline.train.settings import TrainSettings


class Spikes:
    """`losses` are those of the last steps, the same on every rank; `skipped` counts the steps that changed nothing."""

    def __init__(self, settings: TrainSettings) -> None:
        self.sigmas, self.window = settings.skip_spikes, settings.spike_window
        self.losses: list[float] = []
        self.skipped = 0

    def found(self, loss: float) -> bool:
        """Whether this step is to be skipped; to be asked once a step."""
        if self.sigmas is None:
            return False
        spike = is_spike(loss, self.losses, sigmas=self.sigmas, window=self.window)
        self.losses = [*self.losses, loss][-self.window :]
        self.skipped += spike
        return spike

    def state(self) -> dict[str, Any] | None:
        return {"losses": self.losses, "skipped": self.skipped} if self.sigmas is not None else None

    def load(self, state: Mapping[str, Any] | None) -> None:
        if self.sigmas is not None and state is not None:
            self.losses, self.skipped = list(state["losses"]), state["skipped"]
