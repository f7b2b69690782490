"""Evaluation: any number of policies on the same prompts, side by side.

Nothing is trained or chosen here. Where there is a judge it decides the wins, otherwise the held-out reward model
does, otherwise the one that was trained on (then labelled proxy).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from pipeline.evaluate.context_settings import ContextMeasures
from pipeline.flow.artifacts import Comparisons, Documents, Evaluation, Judge, Policy, Prompts, RewardModel
from pipeline.flow.config import Settings, added, not_identity
from pipeline.flow.errors import UserError
from pipeline.flow.stage import Stage, Workspace
from pipeline.rollout.engine import require_room


class Evaluate(Stage):
    name = "evaluate"
    version = 1
    one_process = True  # answers are not shared among ranks
    sources = ("data", "llama", "algo", "rollout", "evaluate", "report")

    class Config(Settings):
        temperature: float = Field(default=1.0, ge=0, description="Of sampling; 0 is greedy. One row has one.")
        samples: int = Field(default=1, ge=1, description="Answers of each policy to each prompt.")
        best_of: int = Field(default=0, ge=0, description="Answers of the reference a prompt for best-of-n; 0: none.")
        prompts: int | None = Field(default=None, ge=1, description="First so many prompts; null takes all.")
        max_new_tokens: int = Field(default=64, ge=1, description="Longest answer.")
        max_tokens: int = Field(default=512, ge=8, description="Longest prompt with its answer.")
        shown: int = Field(default=40, ge=0, description="Prompts in the side-by-side file.")
        context: ContextMeasures | None = added(
            None, "Perplexity by position on `documents`, and retrieval of a pass key by place and length."
        )
        token_budget: int = not_identity(16384, "Tokens a forward pass at most.", ge=1)

    @dataclass
    class Inputs:
        policies: list[Policy]
        prompts: Prompts
        reference: Policy | None = None
        reward: RewardModel | None = None
        heldout_reward: RewardModel | None = None
        judge: Judge | None = None
        documents: Documents | None = None
        pairs: Comparisons | None = None

    @dataclass
    class Outputs:
        evaluation: Evaluation

    headline = ("temperature",)

    @classmethod
    def check(cls, config: Any, given: frozenset[str]) -> None:
        require_room("evaluate.max_new_tokens", config.max_new_tokens, config.max_tokens)
        if config.best_of > 1 and "judge" not in given:
            raise UserError(f"evaluate.best_of is {config.best_of}, but the row has no `judge` to measure it by")
        if config.context and "documents" not in given:
            raise UserError("evaluate.context measures on `documents`, which the row does not have: wire them")
        longest = max(config.context.max_tokens, *config.context.passkey, 0) if config.context else 0
        if longest > config.token_budget:
            raise UserError(
                f"evaluate.token_budget: {config.token_budget}, but context has texts of {longest}; raise it"
            )

    def run(self, inputs: Inputs, workspace: Workspace) -> dict[str, Any]:
        from pipeline.data.reader import Reader
        from pipeline.evaluate.compare import compare_policies
        from pipeline.evaluate.context import context_figures, untrained_figures
        from pipeline.evaluate.panel import Panel
        from pipeline.evaluate.policies import answer, exhibits, kl_to, text_perplexity
        from pipeline.flow.heap import give_back
        from pipeline.llama.device import chosen_device, placed
        from pipeline.llama.open import open_frozen
        from pipeline.report.samples import write_samples
        from pipeline.rollout.collect import fitting
        from pipeline.rollout.engine import SamplingSettings
        from pipeline.rollout.noise import NoiseKey
        from pipeline.rollout.portions import Portions

        config: Evaluate.Config = self.config
        reader = Reader(workspace)
        named = _named(inputs)
        reference_name, reference_artifact = _reference(inputs, named)
        asked = reader.read("prompts", inputs.prompts, "prompts")[: config.prompts]
        prompts = fitting(asked, _chats(named), config.max_tokens, config.max_new_tokens)
        documents = reader.read("documents", inputs.documents, "documents") if inputs.documents else None
        pairs = reader.read("pairs", inputs.pairs, "comparisons") if inputs.pairs else None
        panel = Panel.open(
            proxy=inputs.reward, heldout=inputs.heldout_reward, judge=inputs.judge, token_budget=config.token_budget
        )
        device = chosen_device(workspace.launch.get("device", "auto"))
        reference = open_frozen(reference_artifact)
        key = NoiseKey(workspace.seed, "evaluate")
        sampling = SamplingSettings(
            temperature=config.temperature, samples=config.samples, max_new_tokens=config.max_new_tokens
        )
        kept = Portions(workspace.working("answers"), None, workspace.say)
        everyone = []
        for number, (name, artifact) in enumerate(named.items()):
            workspace.progress(number, len(named) + 1, "policies", policy=name)
            role = open_frozen(artifact)
            with placed(device, role.module):
                found = answer(name, role, prompts, sampling, config.max_tokens, key, kept=kept)
                same = artifact.lineage.get("tokenizer") == reference_artifact.lineage.get("tokenizer")
                if config.temperature == 1.0 and same:
                    with placed(device, reference.module):
                        found.kl = kl_to(reference, role, found.samples, config.token_budget)
                if documents:
                    found.text_perplexity = text_perplexity(role, documents, config.max_tokens, config.token_budget)
                if documents and config.context:
                    found.context = context_figures(
                        role, documents, config.context, workspace.seed, config.token_budget
                    )
            with placed(device, *panel.networks):
                panel.score(found)
            everyone.append(found)
            del role  # before the next one is opened
            give_back()
        untrained = {}
        if config.context and documents:
            with placed(device, reference.module):
                untrained = untrained_figures(reference, documents, config.context, workspace.seed, config.token_budget)
        policies = {a.name: a.metrics() for a in everyone}
        if panel.decisive:
            compared = compare_policies(
                {a.name: a.scores[panel.decisive] for a in everyone},
                reference=reference_name,
                parts={a.name: a.parts for a in everyone} if panel.judge else None,
                seed=workspace.seed,
            )
            for name, more in compared.items():
                policies[name] |= more
        best = None
        if config.best_of > 1 and panel.judge:
            many = sampling.model_copy(update={"samples": config.best_of})
            sample = lambda: answer(reference_name, reference, prompts, many, config.max_tokens, key, kept=kept)
            with placed(device, reference.module, *panel.networks):
                best, closed = panel.best_of_n(reference_name, sample, config.best_of, everyone, workspace.seed)
            for name, share in closed.items():
                policies[name]["gap_closed"] = share
        with placed(device, *panel.networks):
            cards = {name: panel.scorecard(name, pairs) if pairs else None for name in ("proxy", "heldout")}
        metrics = {
            "temperature": config.temperature,
            "policies": policies,
            "reference": reference_name,
            **({"untrained": untrained} if untrained else {}),
            "decided_by": panel.decisive,
            "prompts": len(prompts),
            "dropped_too_long": len(asked) - len(prompts),
            "best_of_n": best,
            "seed": workspace.seed,
            "reward_model": cards["proxy"],
            "heldout_reward_model": cards["heldout"],
            "read": reader.counts,
            "tokens": int(sum(a.length.sum() for a in everyone)),
        }
        directory = workspace.slot("evaluation")
        (directory / "evaluation.json").write_text(json.dumps(metrics, indent=1) + "\n")
        facts = {
            "prompts in all": f"{len(prompts)}",
            "temperature": f"{config.temperature:g}",
            "reference": reference_name,
        }
        write_samples(directory, exhibits(everyone, config.shown), title=workspace.stage, facts=facts)
        return metrics


def _named(inputs: Any) -> dict[str, Policy]:
    """Policies by the name of the row that made them."""
    named: dict[str, Policy] = {}
    for artifact in inputs.policies:
        named[_free(artifact.meta.get("row") or artifact.path.name, artifact, named)] = artifact
    return named


def _free(name: str, artifact: Policy, named: dict[str, Policy]) -> str:
    """The name, told apart where another output of the same row has it."""
    return name if name not in named else f"{name}-{artifact.digest[:8]}"


def _chats(named: dict[str, Policy]) -> list[Any]:
    """The chat format of every tokenizer among the policies, once."""
    from pipeline.data.chat import ChatFormat
    from pipeline.llama.open import open_tokenizer

    distinct = {(a.lineage.get("tokenizer"), a.lineage.get("template")): a for a in named.values()}
    return [ChatFormat(open_tokenizer(artifact)) for artifact in distinct.values()]


def _reference(inputs: Any, named: dict[str, Policy]) -> tuple[str, Policy]:
    """The given reference, or the first policy; it is answered for like the others, so it is put among them."""
    wanted = inputs.reference or inputs.policies[0]
    for name, artifact in named.items():
        if artifact.digest == wanted.digest:
            return name, artifact
    name = _free(wanted.meta.get("row") or "reference", wanted, named)
    named[name] = wanted
    return name, wanted
