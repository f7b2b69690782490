"""Models made new or made anew in memory: random policies, other positions, a scalar head, more words.

model = new_policy(settings, tokenizer, stop_ids, seed)      random weights
classifier = new_classifier(policy, seed)                    a scalar head over a policy's trunk
model = repositioned(start, settings)                        the same weights under other rotary positions
grow_vocabulary(model, size, seed); give_chat(model, tokenizer, seed); extended(policy, template, words, seed)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from pipeline.flow.errors import UserError
from pipeline.llama import adapters
from pipeline.llama.core import CoreForCausalLM, CoreForSequenceClassification
from pipeline.llama.core_config import CoreConfig, core_config, new_config
from pipeline.llama.heads import unwrapped
from pipeline.llama.modeling import LlamaForCausalLM, LlamaForSequenceClassification
from pipeline.llama.presets import ModelSettings
from pipeline.llama.rope_settings import ContextSettings

if TYPE_CHECKING:
    from pipeline.llama.open import Trainable

# Our own models: the classifier over each causal LM's trunk.
CORE: dict[Any, Any] = {
    LlamaForCausalLM: LlamaForSequenceClassification,
    CoreForCausalLM: CoreForSequenceClassification,
}


def new_policy(settings: ModelSettings, tokenizer: Any, stop_ids: Sequence[int], seed: int) -> LlamaForCausalLM:
    """Random weights, the same for the same seed: normal with `initializer_range`, norms 1, biases 0."""
    config = new_config(
        settings.llama(len(tokenizer)),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (CoreForCausalLM if isinstance(config, CoreConfig) else LlamaForCausalLM)(config)
    model.generation_config.eos_token_id = list(stop_ids)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def repositioned(start: Trainable, settings: ContextSettings) -> Any:
    """A causal LM of the same weights under other rotary positions. UserError where `start` has none to change."""
    old = start.model.config
    if not isinstance(start.model, LlamaForCausalLM):
        raise UserError(f"context: a {type(start.model).__name__} is no whole model of our core; start from one")
    facts = core_config(old).to_dict()
    if facts["positions"] != "rotary":
        raise UserError(f"context: the model's positions are {facts['positions']}, not rotary")
    rope = old.rope_parameters
    if settings.rope_parameters:
        trained = rope.get("original_max_position_embeddings", old.max_position_embeddings)
        facts["rope_parameters"] = settings.rope_parameters.parameters(rope["rope_theta"], trained, old.head_dim)
    if settings.max_position_embeddings:
        facts["max_position_embeddings"] = settings.max_position_embeddings
    try:
        config = CoreConfig.from_dict({**facts, **settings.beyond_transformers()})
    except ValueError as problem:
        raise UserError(f"context: {problem}") from problem
    plain = config.plain()
    with torch.device("meta"):
        model: Any = CoreForCausalLM(config) if plain.model_type != "llama" else LlamaForCausalLM(plain)
    model.load_state_dict(start.model.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = start.model.generation_config
    return model


def new_classifier(policy: Any, seed: int) -> Any:
    """A classifier with one output over a policy's trunk (shared, not copied) and a new head.

    Head: normal with standard deviation 1 / sqrt(d + 1) (Stiennon et al. 2020), no bias; the same for the same seed.
    Over an adapter the trunk's adapter is kept and the head is trained beside it.
    """
    inner = unwrapped(policy)
    facts = {k: v for k, v in inner.config.to_dict().items() if k not in ("id2label", "label2id", "architectures")}
    config = type(inner.config).from_dict({**facts, "num_labels": 1})
    with torch.device("meta"):
        if type(inner) in CORE:
            classifier: Any = CORE[type(inner)](config)
        else:
            classifier = AutoModelForSequenceClassification.from_config(config)
    setattr(classifier, classifier.base_model_prefix, inner.base_model)
    reference = next(inner.base_model.parameters())
    head = nn.Linear(config.hidden_size, 1, bias=False, dtype=reference.dtype, device=reference.device)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight = torch.randn(head.weight.shape, generator=generator) / (config.hidden_size + 1) ** 0.5
        head.weight.copy_(weight)
    classifier.score = head
    if not adapters.is_adapted(policy):
        return classifier
    _, parts = adapters.taken_apart(policy)  # plain layers again, in place: the trunk is shared with the classifier
    return adapters.assembled(classifier, parts)


def score_layer(classifier: Any) -> nn.Linear:
    """The linear layer that computes the score, inside peft's wrapper where there is one."""
    score = unwrapped(classifier).score
    return score.modules_to_save[score.active_adapters[0]] if hasattr(score, "modules_to_save") else score


def fold_scale(classifier: Any, mean: float, std: float) -> float:
    """Divide the head by `std`, in place. Returns the shift -mean / std that brings the mean of scores to 0."""
    if not std > 0:
        raise UserError(f"scores with standard deviation {std} cannot be normalised: all answers are scored alike")
    with torch.no_grad():
        score_layer(classifier).weight.div_(std)
    return -mean / std


def grow_vocabulary(model: Any, size: int, seed: int) -> None:
    """Rows for new tokens, in place; old rows keep their bits. New rows: the mean of the old ones plus noise of a
    tenth of their spread, the same for the same seed."""
    old = model.get_input_embeddings().weight.shape[0]
    if size < old:
        raise UserError(
            f"the tokenizer has {size} tokens and the embedding {old} rows: it does not belong to this model"
        )
    model.resize_token_embeddings(size, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    tables = [model.get_input_embeddings().weight]
    if not model.config.tie_word_embeddings:
        tables.append(model.get_output_embeddings().weight)
    with torch.no_grad():
        for table in tables:
            noise = torch.randn(size - old, table.shape[1], generator=generator)
            table[old:] = table[:old].mean(0) + 0.1 * table[:old].std(0) * noise.to(table)


def give_chat(model: Any, tokenizer: Any, seed: int, template: str = "own") -> None:
    """A chat format and its tokens for a model that has none, in place: rows for them, the format's ends as stops.

    UserError where the tokenizer has a template of its own.
    """
    from pipeline.llama.tokenizer import add_chat_tokens, stop_tokens

    add_chat_tokens(tokenizer, template)
    rows = model.get_input_embeddings().weight.shape[0]
    grow_vocabulary(model, max(rows, len(tokenizer)), seed)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = list(stop_tokens(tokenizer))


def extended(policy: Trainable, template: str | None, words: Sequence[str], seed: int) -> Trainable:
    """A policy to train with another chat format, or none where None, and with `words` as one token each.

    UserError where rows would be added under an adapter, which neither trains nor keeps them.
    """
    from pipeline.data.chat import ChatFormat
    from pipeline.llama.tokenizer import add_chat_tokens, add_tokens, stop_tokens

    if template is None and not words:
        return policy
    model, tokenizer = unwrapped(policy.model), policy.tokenizer
    if template is not None:
        add_chat_tokens(tokenizer, template, replace=True)
    add_tokens(tokenizer, words)
    rows = model.get_input_embeddings().weight.shape[0]
    if policy.base_digest is not None and len(tokenizer) > rows:
        raise UserError(
            f"sft.template, sft.add_tokens: {len(tokenizer) - rows} tokens are new to this model, and an adapter would "
            "neither train nor keep their embeddings: set sft.adapter to null, or add them first: rlhf import chat"
        )
    grow_vocabulary(model, max(rows, len(tokenizer)), seed)
    if template is not None:
        model.generation_config.eos_token_id = list(stop_tokens(tokenizer))
    return replace(policy, chat=ChatFormat(tokenizer))
