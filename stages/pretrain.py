"""Pretraining on packed documents, from random weights to a policy: next-token prediction, or another objective.

    documents -> tokenizer (trained here unless one is given) -> windows -> LLaMA -> policy

    pretrain: {objective: {name: fim, rate: 0.9}}      causal, prefix, fim, spans, ul2 (pipeline/data/objectives.py)
    pretrain: {mixture: {weights: {web: 3, books: 1}}}         documents: web, more: books; in shares of tokens
    pretrain: {clean: {duplicates: near}}                      evaluations: what no document may share a run with
    pretrain: {tokenizer: unigram, template: chatml}           byte_bpe, bpe, unigram; formats of data/templates.py
    pretrain: {context: {rope_parameters: {rope_type: yarn, factor: 2}}}       policy: the model that it goes on from

Documents stand side by side in a batch without padding and without seeing each other. A tokenizer trained here has the
control tokens of the objective, and held-out figures are of the same objective.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, field_validator

from pipeline.data.corpus_settings import CleaningSettings, MixtureSettings
from pipeline.data.objectives import Causal, Objective, named
from pipeline.data.templates import TemplateName
from pipeline.flow.artifacts import Comparisons, Conversations, Documents, Policy, Prompts, Tokenizer
from pipeline.flow.config import Settings, added
from pipeline.flow.errors import UserError
from pipeline.flow.stage import OneOrMore, Stage, Workspace
from pipeline.llama.config import SIZES
from pipeline.llama.presets import MAX_POSITIONS, ModelSettings
from pipeline.llama.rope_settings import ContextSettings
from pipeline.llama.tokenizer import BYTES_AND_CONTROL, TokenizerKind, smallest_vocabulary
from pipeline.train.settings import TrainSettings


class Pretrain(Stage):
    name = "pretrain"
    version = 1
    sources = ("data", "llama", "train", "algo")

    class Config(Settings):
        model: ModelSettings = Field(
            default=ModelSettings(), description="Shape of a new LLaMA, or a preset's name; nothing to a `policy`'s."
        )
        vocab_size: int = Field(
            default=1024,
            ge=BYTES_AND_CONTROL,
            le=SIZES["vocab_size"],
            description="Tokens of the tokenizer trained here.",
        )
        tokenizer: TokenizerKind = added(
            "byte_bpe",
            "How the tokenizer trained here cuts text: merges of bytes (GPT-2, Llama 3), SentencePiece's bpe (LLaMA, "
            "Llama 2) or its unigram (Kudo 2018).",
        )
        template: TemplateName | None = added(
            None, "Chat format stored with the tokenizer, by name; own, or what a given tokenizer has, by default."
        )
        max_tokens: int = Field(default=512, ge=2, description="Longest window; longer documents are cut into several.")
        objective: Objective = added(
            Causal(name="causal"),
            "What is predicted of a window: causal, prefix, fim, spans or ul2, by name or with its own settings.",
        )
        mixture: MixtureSettings | None = added(
            None, "Shares of the sources in what is read; without them every document is read once."
        )
        clean: CleaningSettings = added(
            CleaningSettings(), "Documents that are left out: duplicates, and overlap with `evaluations`."
        )
        context: ContextSettings | None = added(
            None, "Of a row that goes on from a `policy`: other rotary positions for it, and the length they promise."
        )
        train: TrainSettings = Field(
            default=TrainSettings(learning_rate=3e-3, batch_tokens=8192, weight_decay=0.1, keep="last"),
            description="Optimiser, schedule and batches.",
        )

        @field_validator("objective", mode="before")
        @classmethod
        def _by_name(cls, value: Any) -> Any:
            return named(value)

    @dataclass
    class Inputs:
        documents: Documents
        heldout: Documents | None = None
        tokenizer: Tokenizer | None = None
        policy: Policy | None = None
        more: OneOrMore[Documents] | None = None
        evaluations: Annotated[list[Documents | Conversations | Comparisons | Prompts], "one will do"] | None = None

    @dataclass
    class Outputs:
        policy: Policy
        tokenizer: Tokenizer

    headline = ("heldout_perplexity", "tokens")

    @classmethod
    def check(cls, config: Any, given: frozenset[str]) -> None:
        try:
            room = config.objective.room(config.max_tokens)
        except ValueError as error:
            raise UserError(f"pretrain.objective.{error}") from error
        if room < 2:
            raise UserError(f"pretrain.max_tokens: {config.max_tokens} leaves no text beside the control tokens")
        config.clean.require_used("pretrain", "evaluations" in given)
        shape = config.model.llama(config.vocab_size)
        learned = shape.get("max_position_embeddings", MAX_POSITIONS) if config.model.positions == "learned" else None
        if learned and config.max_tokens > learned and "policy" not in given:
            raise UserError(
                f"pretrain.max_tokens: {config.max_tokens}, but the model learns {learned} positions; lower it, "
                "or raise pretrain.model.max_position_embeddings"
            )
        if {"tokenizer", "policy"} <= given:
            raise UserError("pretrain.tokenizer: the policy that the row starts from has its own; wire one of the two")
        if {"tokenizer", "policy"} & given and config.tokenizer != "byte_bpe":
            raise UserError("pretrain.tokenizer: none is trained where one is given; leave out one of the two")
        if config.context and "policy" not in given:
            raise UserError("pretrain.context changes the model that a row starts from: wire `policy`, or set `model`")
        if config.template and "policy" in given:
            raise UserError("pretrain.template: the policy that the row starts from has its own; set sft.template")
        needed = smallest_vocabulary(config.tokenizer, config.template or "own", config.objective.control_tokens())
        if not {"tokenizer", "policy"} & given and config.vocab_size < needed:
            what = f"bytes and the control tokens of {config.objective.name}"
            raise UserError(f"pretrain.vocab_size: {config.vocab_size}, but {what} are {needed}; raise it")

    @classmethod
    def check_names(cls, config: Any, names: Mapping[str, Sequence[str]]) -> None:
        if config.mixture:
            config.mixture.require_names("pretrain", [*names["documents"], *names.get("more", ())])

    def run(self, inputs: Inputs, workspace: Workspace) -> dict[str, Any]:
        from pipeline.data.chat import ChatFormat
        from pipeline.data.corpus import read_corpus, read_evaluations
        from pipeline.data.pretraining import pretraining_groups, require_tokens
        from pipeline.data.reader import Reader
        from pipeline.llama.decode import token_bytes
        from pipeline.llama.heads import PolicyModel
        from pipeline.llama.make import new_policy, repositioned
        from pipeline.llama.open import open_tokenizer, open_trainable
        from pipeline.llama.rope import positions
        from pipeline.llama.save import save_model, save_tokenizer
        from pipeline.llama.tokenizer import add_chat_tokens, train_tokenizer
        from pipeline.train import strategy
        from pipeline.train.batches import Plan
        from pipeline.train.loop import Trainer, fit
        from pipeline.train.objectives import next_token

        config: Pretrain.Config = self.config
        reader = Reader(workspace)
        corpus = read_corpus(reader, inputs.documents, inputs.more or ())
        corpus.clean(config.clean, read_evaluations(reader, inputs.evaluations or ()))
        heldout = reader.read("heldout", inputs.heldout, "documents") if inputs.heldout else []
        start = open_trainable(inputs.policy, None, workspace.seed) if inputs.policy else None
        if start and start.base_digest:
            raise UserError(
                "policy: an adapter, but pretraining moves whole weights; merge it first (rlhf export merged)"
            )
        given = start.tokenizer if start else inputs.tokenizer and open_tokenizer(inputs.tokenizer)
        if given:
            tokenizer = given
            require_tokens(tokenizer, config.objective)
            if config.template:
                add_chat_tokens(tokenizer, config.template, replace=True)
        else:
            once = corpus.documents  # whatever their shares
            workspace.say(f"training a tokenizer of {config.vocab_size} tokens on {len(once)} documents")
            texts = (m.content if isinstance(m.content, str) else "" for d in once for m in d.messages)
            plain = (d.text for d in once if d.text)
            tokenizer = train_tokenizer(
                [*plain, *filter(None, texts)],
                config.vocab_size,
                kind=config.tokenizer,
                template=config.template or "own",
                more=config.objective.control_tokens(),
            )
        chat = ChatFormat(tokenizer)
        lengths = lambda records: [len(ids) for ids in chat.documents_ids(records)]
        documents = corpus.mixed(config.mixture, lengths, workspace.seed)
        laid_out = lambda records: pretraining_groups(
            records, chat, config.max_tokens, config.objective, workspace.seed
        )
        encoded = laid_out(documents).required("documents", config.max_tokens)
        model = start.model if start else new_policy(config.model, tokenizer, chat.stop_ids, workspace.seed)
        if start and config.context:
            before, model = start.model.config, repositioned(start, config.context)
            workspace.lineage("policy", positions_before=positions(before), positions=positions(model.config))
        module = PolicyModel(model)
        ranks = strategy.for_row(workspace, precision=config.train.precision, clip=config.train.clip)
        plan = Plan(encoded.groups, config.train, seed=workspace.seed, strategy=ranks)
        trainer = Trainer(module, next_token, config.train, ranks, total=len(plan), seed=workspace.seed)
        held = None
        if heldout:
            held = trainer.share(laid_out(heldout).required("heldout", config.max_tokens).groups)
        evaluate = (lambda: trainer.evaluate(held)) if held is not None else None
        outcome = fit(trainer, plan, workspace, evaluate=evaluate, best_by="nll", figures=("loss", "learning_rate"))
        with trainer.whole():
            if ranks.main:
                save_model(model, tokenizer, workspace.slot("policy"))
                save_tokenizer(tokenizer, workspace.slot("tokenizer"))
        found = outcome.evaluations[-1] if outcome.evaluations else {}
        return {
            "loss": outcome.last.get("nll"),
            "heldout_loss": found.get("nll"),
            "heldout_perplexity": math.exp(found["nll"]) if "nll" in found else None,
            "parameters": sum(p.numel() for p in model.parameters()),
            "cache_bytes_per_token": token_bytes(model),
            "documents": len(documents),
            "windows": len(encoded.groups),
            **corpus.figures,
            **({"windows_by_objective": encoded.made} if encoded.made else {}),
            "cut_documents": encoded.shortened,
            "steps": outcome.steps,
            **({"skipped_steps": outcome.skipped} if config.train.skip_spikes is not None else {}),
            "tokens": outcome.tokens,
            "read": reader.counts,
        }
