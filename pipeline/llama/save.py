"""Models and adapters written as Hugging Face directories, and read back before anybody relies on them.

save_policy(policy, workspace); save_model(model, tokenizer, directory, base_digest=None)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from pipeline.flow.errors import Damaged
from pipeline.llama import adapters, quantise_settings
from pipeline.llama.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from pipeline.flow.stage import Workspace
    from pipeline.llama.open import Trainable

SETS = ("target_modules", "feedforward_modules", "modules_to_save", "exclude_modules")


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    tokenizer.save_pretrained(directory)


def save_policy(policy: Trainable, workspace: Workspace, slot: str = "policy") -> None:
    """Weights, or the adapter alone, with the tokenizer, into a slot of the row; the first rank writes."""
    if workspace.rank != 0:
        return
    save_model(policy.model, policy.tokenizer, workspace.slot(slot), base_digest=policy.base_digest)


def save_model(
    model: Any,
    tokenizer: Any,
    directory: Path,
    *,
    base_digest: str | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """A Hugging Face directory in safetensors; of an adapted model the adapter alone, over the base of that digest.

    `state` holds full weights gathered from shards. Raises Damaged where a tensor came out empty or not finite:
    partitioned weights that nobody gathered look like that (trl#4416).
    """
    directory.mkdir(parents=True, exist_ok=True)
    if adapters.is_adapted(model):
        if base_digest is None:
            raise ValueError("an adapter is saved with the digest of its base")
        _save_adapter(model, directory, base_digest, state)
    else:
        with adapters.quiet():
            model.save_pretrained(directory, state_dict=dict(state) if state is not None else None)
        written = revert_weight_conversion(model, dict(state or model.state_dict()))  # experts lie one by one
        shapes = {k: tuple(v.shape) for k, v in written.items()}
        _verify_saved(sorted(directory.glob("model*.safetensors")), shapes, tied=model.config.tie_word_embeddings)
    save_tokenizer(tokenizer, directory)


def _save_adapter(model: Any, directory: Path, digest: str, state: Mapping[str, Tensor] | None) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    kept = get_peft_model_state_dict(
        model, state_dict=dict(state) if state is not None else None, save_embedding_layers=False
    )
    config, kept = adapters.saved_form(model, kept)
    tensors = {k: v.detach().contiguous().cpu() for k, v in kept.items()}
    remark = {"below": "stack"} if adapters.is_stacked(model) else {}
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt", **remark})
    if (quantisation := quantise_settings.of(model)) is not None:
        (directory / quantise_settings.QUANTISATION).write_text(quantisation.model_dump_json(indent=2) + "\n")
    config.base_model_name_or_path, config.inference_mode = digest, True
    config.save_pretrained(str(directory))
    _sorted_json(directory / ADAPTER_CONFIG)
    _verify_saved([directory / ADAPTER_WEIGHTS], {k: tuple(v.shape) for k, v in tensors.items()}, tied=False)


def _sorted_json(path: Path) -> None:
    """peft writes sets in the order of their hashes, which differ between processes; digests must not."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key, value in config.items():
        if key in SETS and isinstance(value, list):
            config[key] = sorted(value)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _verify_saved(files: Iterable[Path], shapes: Mapping[str, tuple[int, ...]], *, tied: bool) -> None:
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                tensor = file.get_tensor(key)
                found[key] = tuple(tensor.shape)
                if not tensor.numel() or not torch.isfinite(tensor).all():
                    raise Damaged(f"{path}: {key} of shape {found[key]} was saved empty or not finite")
    missing = {k: s for k, s in shapes.items() if found.get(k) != s and not (tied and k == "lm_head.weight")}
    if missing:
        key, shape = next(iter(missing.items()))
        raise Damaged(f"{len(missing)} weights were not saved whole, such as {key}: {found.get(key)} for {shape}")
