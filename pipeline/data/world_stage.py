"""The source of kind `world`: generates the small world and writes it as a row of its own, with no inputs.

sources:
  world: {kind: world, seed: 0, documents: 60000}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from pipeline.data.world import LONG_WORDS, Sizes, as_json, build_world
from pipeline.flow.artifacts import Comparisons, Conversations, Documents, Judge, Prompts
from pipeline.flow.config import Settings, added
from pipeline.flow.stage import Stage, Workspace


class WorldStage(Stage):
    name = "world"
    version = 1
    one_process = True
    headline = ("documents", "prompts")
    sources = tuple(f"data/world{part}.py" for part in ("", "_crowd", "_facts", "_long", "_text", "_truth"))

    class Config(Settings):
        """`seed` makes another world: other facts, other people behind the answers, other splits."""

        seed: int = Field(default=0, ge=0, description="Seed of the world.")
        length_bias: float = Field(
            default=0.0, description="Worth that labellers see in every word of an answer: a flaw to plant; 0 is fair."
        )
        documents: int = Field(default=Sizes.documents, ge=1, description="Texts for pretraining.")
        heldout_documents: int = Field(default=Sizes.heldout_documents, ge=1, description="Texts for perplexity.")
        conversations: int = Field(default=Sizes.conversations, ge=1, description="Demonstrations, and perfect ones.")
        comparisons: int = Field(default=Sizes.comparisons, ge=1, description="Labelled comparisons for training.")
        heldout_pairs: int = Field(default=Sizes.heldout_pairs, ge=1, description="Labelled pairs on other prompts.")
        prompts: int = Field(default=Sizes.prompts, ge=1, description="Prompts to sample from in training.")
        dev: int = Field(default=Sizes.dev, ge=1, description="Prompts for tuning.")
        heldout: int = Field(default=Sizes.heldout, ge=1, description="Prompts for the figures that are reported.")
        long_documents: int = added(
            0, "Texts of `long_words` words that state a pass key and name it again and again.", ge=0
        )
        heldout_long_documents: int = added(0, "The same, for perplexity by position and retrieval.", ge=0)
        long_words: int = added(LONG_WORDS, "Words of each of them, at least.", ge=1)

    @dataclass
    class Inputs:
        pass

    @dataclass
    class Outputs:
        documents: Documents
        heldout_documents: Documents
        conversations: Conversations
        perfect_conversations: Conversations
        comparisons: Comparisons
        heldout_pairs: Comparisons
        prompts: Prompts
        dev: Prompts
        heldout: Prompts
        judge: Judge
        long_documents: Documents | None = None
        heldout_long_documents: Documents | None = None

    @classmethod
    def withheld(cls, config: Any) -> frozenset[str]:
        return frozenset(name for name in ("long_documents", "heldout_long_documents") if not getattr(config, name))

    def run(self, inputs: Inputs, workspace: Workspace) -> dict[str, Any]:
        from pipeline.data.sources import write_jsonl

        settings = self.config.model_dump()
        others = {name: settings.pop(name) for name in ("seed", "length_bias", "long_words")}
        world = build_world(**others, sizes=Sizes(**settings))
        counts = {}
        slots = [name for name in self.Outputs.__dataclass_fields__ if name not in self.withheld(self.config)]
        for slot in slots:
            if slot == "judge":
                rows = ({"prompt": as_json(m), "key": key.to_json()} for m, key in world.judge)
                counts[slot] = write_jsonl(workspace.slot(slot) / "judge.jsonl", rows)
            else:
                counts[slot] = write_jsonl(workspace.slot(slot) / "data.jsonl", getattr(world, slot))
            workspace.progress(len(counts), len(slots), unit="files")
        return counts
