"""Model directories opened, with proof that every weight was loaded; make.py makes new ones, save.py writes them.

    opened = open_policy(artifact)                    Opened(model, tokenizer, record)
    opened = open_classifier(artifact)                a reward model: its head loaded, never initialised
    policy = open_trainable(artifact, adapter, seed)  Trainable(module=PolicyModel, chat, ...): whole or an adapter
    critic = open_trainable_classifier(artifact, adapter, seed)  the same with a scalar head, new over a policy

Type llama with fields that our core knows is computed by `modeling.py`, mixtral and our own type by `core.py`, anything
else by transformers' own class, remote code off; `record` says which and why. A directory that holds an adapter names
the digest of its base; the base's path comes from `artifact.bases`. A base that is an adapter itself is merged, or kept
under the one above where that one's weights were saved with the remark `below: stack`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.flow.artifacts import members
from pipeline.flow.errors import UserError
from pipeline.flow.heap import give_back
from pipeline.llama import adapters, quantise_settings
from pipeline.llama.adapter_settings import AnyAdapter
from pipeline.llama.config import check_config, read_json, refuse_code
from pipeline.llama.core import CoreForCausalLM
from pipeline.llama.core_config import core_config
from pipeline.llama.heads import PolicyModel, ScalarModel
from pipeline.llama.make import CORE, give_chat, new_classifier
from pipeline.llama.modeling import LlamaForCausalLM
from pipeline.llama.quantise_settings import AnyQuantise
from pipeline.llama.save import save_model
from pipeline.llama.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Entry, require_weights

if TYPE_CHECKING:
    from pipeline.data.chat import ChatFormat

MOST_RANK = 1 << 14  # of an adapter that somebody else trained: its matrices are made before its weights are read
KINDS = ("LORA", "IA3", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")


class ModelArtifact(Protocol):
    """What is read of an artifact here."""

    @property
    def path(self) -> Path: ...
    @property
    def digest(self) -> str: ...
    @property
    def bases(self) -> Mapping[str, Path]: ...


@dataclass(frozen=True)
class Opened:
    """record: {"implementation": "core" | class name, "why": [...], "ignored": [...], "form": "full" | "adapter"}."""

    model: Any  # PreTrainedModel or PeftModel
    tokenizer: Any
    record: dict[str, Any]


@dataclass(frozen=True)
class Trainable:
    """A model to train with what is needed to feed and to save it."""

    module: Any  # PolicyModel or ScalarModel
    model: Any  # PreTrainedModel or PeftModel inside it
    tokenizer: Any
    chat: ChatFormat
    base_digest: str | None  # of the full model below, for adapters
    record: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------- opening


def open_policy(artifact: ModelArtifact, *, dtype: torch.dtype = torch.float32) -> Opened:
    """A causal LM, in eval mode. Raises UserError naming the file for what is refused, missing or left over."""
    return _open(artifact, classifier=False, dtype=dtype)


def open_classifier(artifact: ModelArtifact, *, dtype: torch.dtype = torch.float32) -> Opened:
    """A classifier with one output whose head was proven to come from the files."""
    return _open(artifact, classifier=True, dtype=dtype)


def open_tokenizer(artifact: ModelArtifact | Path) -> Any:
    """The tokenizer in an artifact's directory, a lone tokenizer.model too; nothing is looked up elsewhere."""
    path = artifact if isinstance(artifact, Path) else artifact.path
    settings, pieces = path / "tokenizer_config.json", path / "tokenizer.model"
    if pieces.is_file() and not settings.is_file() and not (path / "tokenizer.json").is_file():
        from pipeline.llama.tokenizer import open_pieces

        return open_pieces(pieces)
    if settings.is_file():
        refuse_code(read_json(settings), str(settings))
    special = path / "special_tokens_map.json"
    if special.is_file() and (named := [key for key in read_json(special) if key.endswith("_file")]):
        raise UserError(f"{special}: {named[0]} names a file to read, where only tokens belong; remove the key")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as problem:  # tokenizers raises Exception itself, transformers whatever a damaged file leads to
        why = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
        raise UserError(f"{path}: holds no tokenizer that can be opened: {why}") from problem


def _open(
    artifact: ModelArtifact,
    *,
    classifier: bool,
    dtype: torch.dtype,
    trainable: bool = False,
    quantise: AnyQuantise | None = None,
) -> Opened:
    model, record = _open_model(artifact, classifier=classifier, dtype=dtype, trainable=trainable, quantise=quantise)
    if trainable:
        _refuse_attention_dropout(artifact, model)
    return Opened(model.eval(), open_tokenizer(artifact), record)


def _open_model(
    artifact: ModelArtifact,
    *,
    classifier: bool,
    dtype: torch.dtype,
    trainable: bool = False,
    new_head: bool = False,
    quantise: AnyQuantise | None = None,
) -> tuple[Any, dict[str, Any]]:
    """`new_head`: the head may be missing here, because it comes from the adapter above. `quantise`: a whole model is
    opened so; an adapter says itself how its base is."""
    if not (artifact.path / ADAPTER_CONFIG).is_file():
        return _open_full(artifact.path, classifier=classifier, dtype=dtype, new_head=new_head, quantise=quantise)
    path = artifact.path
    config = _read_adapter(path)
    stored = set(_adapter_weights(path, config))
    scalar = any(key.endswith("score.weight") for key in stored)
    if classifier != scalar and not new_head:
        holds = "holds no score.weight: an adapter of a policy" if classifier else "is an adapter of a classifier"
        raise UserError(f"{path / ADAPTER_WEIGHTS}: {holds}, another kind of model than is needed here")
    below = _Below.of(artifact)
    quantised = quantise_settings.stored(path)
    base, record = _open_model(below, classifier=scalar, dtype=dtype, new_head=scalar, quantise=quantised)
    if adapters.is_adapted(base) and not _stacked(path):
        base = adapters.merged(base)
        _quantise(base, quantised)
    with adapters.quiet(), _told(path):
        model = _over(base, path, trainable)
    _require_whole(model, path, stored)
    if classifier and not scalar:
        model = new_classifier(model, seed=0)
    return model, {**record, "form": "adapter"}


@dataclass(frozen=True)
class _Below:
    """The base of an adapter as an artifact."""

    path: Path
    digest: str
    bases: Mapping[str, Path]

    @classmethod
    def of(cls, artifact: ModelArtifact) -> _Below:
        digest = str(base_digest(artifact))
        path = _base_path(artifact)
        return cls(path, digest, {key: place for key, place in artifact.bases.items() if key != digest})


def _base_path(artifact: ModelArtifact) -> Path:
    digest = base_digest(artifact)
    if digest is None or digest not in artifact.bases:
        raise UserError(
            f"{artifact.path / ADAPTER_CONFIG}: base_model_name_or_path is {digest!r}, expected the digest of a model "
            "at hand; give the base model beside the adapter"
        )
    return artifact.bases[digest]


def base_digest(artifact: ModelArtifact) -> str | None:
    """The digest of the model below an adapter, None for a full model."""
    path = artifact.path / ADAPTER_CONFIG
    if not path.is_file():
        return None
    named = str(read_json(path).get("base_model_name_or_path"))
    # An adapter that a user brought names a hub id; its base was given beside it and stands first.
    return named if named in artifact.bases or not artifact.bases else next(iter(artifact.bases))


def _open_full(
    path: Path,
    *,
    classifier: bool,
    dtype: torch.dtype,
    new_head: bool = False,
    quantise: AnyQuantise | None = None,
) -> tuple[Any, dict]:
    """`new_head`: the head may be missing here, because it comes from the adapter above."""
    config_path = path / "config.json"
    config = read_json(config_path)
    if (path / ADAPTER_CONFIG).exists():  # transformers would go on to the model that it names
        raise UserError(f"{path / ADAPTER_CONFIG}: an adapter beside a whole model; keep one of the two there")
    verdict = check_config(config, str(config_path))
    require_weights(path, "model", config)
    generation = path / "generation_config.json"
    if generation.is_file():
        refuse_code(read_json(generation), str(generation))
    facts: dict[str, Any] = {"num_labels": 1} if classifier else {}
    if classifier and len(config.get("id2label") or ()) != 1:
        facts |= {"id2label": {0: "SCORE"}, "label2id": {"SCORE": 0}}
    with adapters.quiet(), _told(path):
        cls: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
        if verdict.core:
            lm = LlamaForCausalLM if config["model_type"] == "llama" else CoreForCausalLM
            cls = CORE[lm] if classifier else lm
            if lm is CoreForCausalLM:
                facts = {"config": core_config(AutoConfig.from_pretrained(path, local_files_only=True, **facts))}
        model, info = cls.from_pretrained(
            path,
            dtype="auto" if quantise else dtype,  # as the file has them: nothing is there in float32 as a whole
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **({} if verdict.core else {"trust_remote_code": False}),
            **facts,
        )
    _require_loaded(path, info, head="score.weight" if new_head else None)
    _quantise(model, quantise, dtype)
    _align(model)
    record = {
        "implementation": "core" if verdict.core else type(model).__name__,
        "why": list(verdict.why),
        "ignored": list(verdict.ignored),
        "form": "full",
    }
    return model, record


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What transformers or peft make of a config that a stranger wrote, in one line."""
    try:
        yield
    except Exception as problem:  # of whatever kind its values lead to
        why = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
        raise UserError(f"{path}: holds no model that can be opened: {why:.1000}") from problem


def _quantise(model: nn.Module, settings: AnyQuantise | None, dtype: torch.dtype = torch.float32) -> None:
    """In place; what stays as it is becomes `dtype`. Nothing without settings."""
    if settings is None:
        return
    from pipeline.llama.quantised import quantise

    quantise(model, settings)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    give_back()


def _align(model: nn.Module) -> None:
    """Copy weights that lie where the file put them to addresses that vector units like.

    Off a 64-byte line products take other paths: slower, and with other last bits than in the process that trained
    them. The copy also lets go of the file.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def _require_loaded(path: Path, info: Mapping[str, Any], head: str | None) -> None:
    missing = set(info["missing_keys"]) - {head}
    # A causal LM's own head has no place in a classifier; old checkpoints stored the rotary frequencies.
    left_over = {
        k
        for k in info["unexpected_keys"]
        if not k.endswith("rotary_emb.inv_freq") and not (head is not None and k == "lm_head.weight")
    }
    wrong = {str(k[0] if isinstance(k, tuple) else k) for k in info["mismatched_keys"]}
    for what, keys in (
        ("weights are missing", missing),
        ("weights have another shape", wrong),
        ("weights have no place in this model", left_over),
    ):
        if keys:
            some = ", ".join(sorted(keys)[:5])
            raise UserError(
                f"{path}: {len(keys)} {what}: {some}{' ...' if len(keys) > 5 else ''}; the files hold another kind of "
                "model than is needed here, or are incomplete"
            )


def _read_adapter(path: Path) -> dict[str, Any]:
    """peft's configuration; UserError where it is of a kind, or of sizes, that are not opened here."""
    where = path / ADAPTER_CONFIG
    config = read_json(where)
    refuse_code(config, str(where))
    kind = config.get("peft_type")
    if kind not in KINDS:
        raise UserError(f"{where}: peft_type is {kind!r}, expected one of {', '.join(KINDS)}")
    patterns = config.get("rank_pattern") or {}
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else [patterns])]
    if kind == "LORA" and not all(type(rank) is int and 1 <= rank <= MOST_RANK for rank in ranks):
        raise UserError(f"{where}: r and rank_pattern: whole numbers from 1 to {MOST_RANK} were expected")
    if config.get("layer_replication") is not None:
        raise UserError(f"{where}: layer_replication makes another model of the base, which is not done here")
    return config


def _adapter_weights(path: Path, config: Mapping[str, Any]) -> dict[str, Entry]:
    """What the weight file holds; UserError where virtual tokens are other ones than the configuration tells, whose
    place is made before they are read."""
    found = require_weights(path, "adapter_model")
    if config["peft_type"] not in KINDS[2:]:
        return found
    prefix = config["peft_type"] == "PREFIX_TUNING"
    sizes = [config.get(key) for key in ("num_virtual_tokens", "token_dim", *(["num_layers"] if prefix else []))]
    if not all(type(n) is int and n > 0 for n in sizes):
        raise UserError(
            f"{path / ADAPTER_CONFIG}: num_virtual_tokens, token_dim and num_layers: whole numbers from 1 were expected"
        )
    tokens, *each = (int(n or 0) for n in sizes)
    expected = (tokens, (2 if prefix else 1) * math.prod(each))
    shape = found["prompt_embeddings"].shape if "prompt_embeddings" in found else None
    if shape != expected or config.get("num_transformer_submodules") not in (None, 1):
        raise UserError(
            f"{path / ADAPTER_WEIGHTS}: prompt_embeddings of shape {shape}, expected {expected} by {ADAPTER_CONFIG}"
        )
    return found


def _stacked(path: Path) -> bool:
    """Whether an adapter was trained over another one that was kept."""
    from safetensors import safe_open

    with safe_open(path / ADAPTER_WEIGHTS, "pt") as file:
        return (file.metadata() or {}).get("below") == "stack"


def _over(base: Any, path: Path, trainable: bool) -> Any:
    """The adapter in `path` over a base, which may have others."""
    from peft import PeftConfig, PeftModel
    from safetensors.torch import load_file

    if adapters.is_adapted(base):
        plain, below = adapters.taken_apart(base)
        own = adapters.Part(PeftConfig.from_pretrained(str(path)), load_file(path / ADAPTER_WEIGHTS))
        model = adapters.assembled(plain, [*below, own])
        return model if trainable else model.requires_grad_(False)
    tokens = read_json(path / ADAPTER_CONFIG)["peft_type"] in KINDS[2:]  # peft opens them frozen alone
    model = PeftModel.from_pretrained(base, str(path), is_trainable=trainable and not tokens)
    if trainable and tokens:
        adapters.train_tokens(model)
    return model


def _require_whole(model: Any, path: Path, stored: set[str]) -> None:
    from peft import get_peft_model_state_dict

    needed = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if needed - stored:
        raise UserError(
            f"{path / ADAPTER_WEIGHTS}: {len(needed - stored)} adapter weights are missing, such as "
            f"{sorted(needed - stored)[0]}"
        )


# ------------------------------------------------------------------------------------------------------------ training


def open_trainable(
    artifact: ModelArtifact,
    adapter: AnyAdapter | None,
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> Trainable:
    """A policy to train. A full policy is trained whole, or as `adapter` says; a policy that is an adapter is trained
    on as that adapter (`adapter` unset, or saying the same), or is what `adapter.beneath` makes of it."""
    quantise = adapter.quantise if adapter else None
    opened = _open(artifact, classifier=False, dtype=dtype, trainable=True, quantise=quantise)
    model, below = _adapted(opened.model, artifact, adapter, seed)
    return _trainable(PolicyModel(model), model, opened, below)


def open_trainable_classifier(
    artifact: ModelArtifact,
    adapter: AnyAdapter | None,
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> Trainable:
    """A scalar model to train: a reward model with its head, or a policy's trunk under a new head."""
    quantise = adapter.quantise if adapter else None
    if getattr(artifact, "kind", None) == "reward_model":
        opened = _open(artifact, classifier=True, dtype=dtype, trainable=True, quantise=quantise)
    else:
        opened = _open(artifact, classifier=False, dtype=dtype, trainable=True, quantise=quantise)
        merge = adapter is not None and adapter.beneath == "merge" and adapters.is_adapted(opened.model)
        trunk = adapters.merged(opened.model) if merge else opened.model
        opened = Opened(new_classifier(trunk, seed), opened.tokenizer, opened.record)
    model, below = _adapted(opened.model, artifact, adapter, seed)
    return _trainable(ScalarModel(model), model, opened, below)


def open_frozen(artifact: ModelArtifact, *, dtype: torch.dtype = torch.float32) -> Trainable:
    """A policy that is only asked: the reference that a row starts from, or one that is sampled or evaluated."""
    opened = _open(artifact, classifier=False, dtype=dtype)
    frozen = _trainable(PolicyModel(opened.model), opened.model, opened, None)
    frozen.module.requires_grad_(False).eval()
    return frozen


def open_start(
    artifact: ModelArtifact, adapter: AnyAdapter | None, seed: int, *, dtype: torch.dtype = torch.float32
) -> Trainable:
    """What the trained policy is before the first update, frozen, to the bit: the policy itself, or the form in which
    it is trained where that is not the same."""
    if adapter is None or adapter.keeps_start:
        return open_frozen(artifact, dtype=dtype)
    start = open_trainable(artifact, adapter, seed, dtype=dtype)
    start.module.requires_grad_(False).eval()
    return start


def _adapted(model: Any, artifact: ModelArtifact, adapter: AnyAdapter | None, seed: int) -> tuple[Any, str | None]:
    """The model as it is trained, and the digest of what lies below its adapter."""
    if adapter is None:
        return model, base_digest(artifact)
    if adapters.is_adapted(model) and adapter.beneath != "merge":
        _require_same_weights(model, adapter.quantise)
    if adapters.is_adapted(model) and adapter.beneath == "same":
        adapters.require_same(model, adapter)
        adapters.mark_rates(model, adapter)
        return model, base_digest(artifact)
    if adapters.is_adapted(model) and adapter.beneath == "stack":
        return adapters.stack_new(model, adapter, seed), artifact.digest
    plain = model
    if adapters.is_adapted(model):
        plain = adapters.merged(model)
        _quantise(plain, adapter.quantise)
    made = adapters.add_adapter(plain, adapter, seed)
    return made, artifact.digest if adapters.is_adapted(made) else None


def _require_same_weights(model: Any, asked: AnyQuantise | None) -> None:
    """An adapter that is kept was trained over weights as they were."""
    have = quantise_settings.of(model)
    if asked is not None and have != asked:
        told = "are not quantised" if have is None else f"are quantised otherwise ({have!r})"
        raise UserError(
            f"adapter.quantise: the weights under the adapter that the row starts from {told}: leave it out to keep "
            "them so, or set adapter.beneath to merge"
        )


def _refuse_attention_dropout(artifact: ModelArtifact, model: Any) -> None:
    """Forest attention has none, and training without a dropout that the model asks for would not be said."""
    if rate := getattr(model.config, "attention_dropout", 0.0):
        raise UserError(
            f"{artifact.path / 'config.json'}: attention_dropout is {rate}, but models are trained without it here: "
            "set it to 0.0"
        )


def _trainable(module: nn.Module, model: Any, opened: Opened, below: str | None) -> Trainable:
    from pipeline.data.chat import ChatFormat

    module.train()
    return Trainable(module, model, opened.tokenizer, ChatFormat(opened.tokenizer), below, opened.record)


def import_with_chat(source: Path, directory: Path, seed: int, template: str = "own") -> None:
    """A copy of a model directory, in its stored precision, that has been given a chat format by name."""
    for _ in members(source):  # no pipe, no device, no link that leaves
        pass
    config = read_json(source / "config.json")
    stored = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"), None)
    stored = stored if isinstance(stored, torch.dtype) else torch.float32
    model, _ = _open_full(source, classifier=False, dtype=stored)
    tokenizer = open_tokenizer(source)
    give_chat(model, tokenizer, seed, template)
    save_model(model, tokenizer, directory)
