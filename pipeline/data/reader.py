"""How a stage reads its inputs: bad rows refused or set aside as the run says, counts kept for the row's metrics."""

from __future__ import annotations

from typing import Any

from pipeline.data.sources import Read, read


class Reader:
    """`read` opens one input slot; `counts` says of every slot how many records it gave and what was left out."""

    def __init__(self, workspace: Any) -> None:
        self.workspace = workspace
        self.counts: dict[str, dict[str, Any]] = {}

    def read(self, slot: str, artifact: Any, kind: str) -> Read[Any]:
        """Records of a slot. Raises UserError listing every bad row, unless the run skips them: then they are
        counted, said, and written to the slot's quarantine file."""
        skip = self.workspace.skip_bad
        quarantine = self.workspace.quarantine(slot) if skip else None
        found = read(artifact, kind, skip_bad=skip, quarantine=quarantine)
        self.counts[slot] = {"format": found.format, **found.counts}
        if found.bad:
            self.counts[slot]["reasons"] = found.reasons
            self.workspace.say(f"{slot}: {len(found.bad)} of {found.counts['rows']} rows skipped: {found.reasons}")
        return found
