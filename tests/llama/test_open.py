"""Model directories: what is opened, by whom it is computed, what is refused, and what is proven on the way."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pipeline.data.forest import Segment, build
from pipeline.flow.artifacts import Policy
from pipeline.flow.errors import UserError
from pipeline.flow.store import Store
from pipeline.llama import adapters
from pipeline.llama.adapter_settings import (
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
)
from pipeline.llama.heads import PolicyModel, ScalarModel, hidden_states
from pipeline.llama.make import fold_scale, score_layer
from pipeline.llama.modeling import LlamaForCausalLM, LlamaForSequenceClassification
from pipeline.llama.open import (
    import_with_chat,
    open_classifier,
    open_policy,
    open_tokenizer,
    open_trainable,
    open_trainable_classifier,
)
from pipeline.llama.save import save_model
from tests.llama.conftest import LORA, at, policy

FOREST = build(
    [[Segment([1, 20, 30, 40], weights=[1.0] * 4), Segment([50, 60], 0, weights=[1.0] * 2), Segment([70], 0)]]
)


def edited(stored: Path, to: Path, config: dict | None = None, weights=None) -> Path:
    to.mkdir(exist_ok=True)
    for file in stored.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    if config is not None:
        (to / "config.json").write_text(json.dumps({**json.loads((to / "config.json").read_text()), **config}))
    if weights is not None:
        save_file(weights(load_file(to / "model.safetensors")), to / "model.safetensors", {"format": "pt"})
    return to


def moved(model, seed: int = 0) -> None:
    """Stand in for training: every trainable weight changes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))


def test_a_policy_comes_back_as_it_was_and_says_who_computes_it(stored: Path, tokenizer) -> None:
    opened = open_policy(at(stored))
    assert type(opened.model) is LlamaForCausalLM and not opened.model.training
    assert opened.record["implementation"] == "core" and opened.record["form"] == "full"
    expected = PolicyModel(policy(tokenizer))(FOREST).logprobs_T
    assert torch.equal(PolicyModel(opened.model)(FOREST).logprobs_T, expected)
    assert opened.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert next(open_policy(at(stored), dtype=torch.bfloat16).model.parameters()).dtype == torch.bfloat16


def test_opening_is_silent(stored: Path, tmp_path: Path, tokenizer, capfd) -> None:
    capfd.readouterr()
    save_model(open_policy(at(stored)).model, tokenizer, tmp_path)
    assert capfd.readouterr() == ("", "")


def test_fields_beyond_the_core_are_computed_by_transformers(stored: Path, tmp_path: Path, tokenizer) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    longrope = {"rope_parameters": {**rope, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}}
    opened = open_policy(at(edited(stored, tmp_path / "longrope", longrope)))
    assert opened.record["implementation"] == "LlamaForCausalLM" and opened.record["why"]
    assert type(opened.model) is transformers.LlamaForCausalLM
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    qwen = transformers.Qwen2ForCausalLM(config).eval()
    save_model(qwen, tokenizer, tmp_path / "qwen")
    opened = open_policy(at(tmp_path / "qwen"))
    assert opened.record["implementation"] == "Qwen2ForCausalLM"
    found, expected = (PolicyModel(m)(FOREST).logprobs_T for m in (opened.model, qwen))
    assert torch.equal(found, expected)
    fresh = open_trainable_classifier(at(tmp_path / "qwen"), None, 0)
    save_model(fresh.model, tokenizer, tmp_path / "scorer")
    again = open_classifier(at(tmp_path / "scorer", "reward_model"))
    assert (ScalarModel(again.model)(FOREST) - fresh.module(FOREST)).abs().max() <= 1e-6


@pytest.mark.parametrize("key", ["auto_map", "_attn_implementation_internal", "trust_remote_code"])
def test_configs_that_run_code_are_refused(key: str, stored: Path, tmp_path: Path) -> None:
    path = edited(stored, tmp_path / "evil", {key: "someone/evil"})
    with pytest.raises(UserError, match=key):
        open_policy(at(path))
    for name in ("generation_config.json", "tokenizer_config.json"):
        path = edited(stored, tmp_path / name)
        (path / name).write_text(json.dumps({**json.loads((path / name).read_text()), "auto_map": {"A": "b.C"}}))
        with pytest.raises(UserError, match=f"{name}.*auto_map"):
            open_policy(at(path))


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("config.json", {"transformers_weights": "../stored/model.safetensors"}, "transformers_weights names a weight"),
        ("config.json", {"transformers_weights": "other.safetensors"}, "transformers_weights names a weight file"),
        ("config.json", {"rope_parameters": {"rope_type": "yarn", "factor": "x"}}, "rope_parameters.factor: Input"),
        ("config.json", {"model_type": "../../x"}, "holds no model that can be opened"),
        ("special_tokens_map.json", {"tokenizer_file": "/etc/passwd"}, "tokenizer_file names a file to read"),
        ("special_tokens_map.json", {"vocab_file": "/dev/zero"}, "vocab_file names a file to read"),
        ("adapter_config.json", {"base_model_name_or_path": "../stored"}, "an adapter beside a whole model"),
    ],
)
def test_files_of_a_model_name_no_others(stored: Path, tmp_path: Path, name: str, change: dict, told: str) -> None:
    path = edited(stored, tmp_path / "evil")
    before = json.loads((path / name).read_text()) if (path / name).exists() else {}
    (path / name).write_text(json.dumps({**before, **change}))
    with pytest.raises(UserError, match=str(path)) as error:
        import_with_chat(path, tmp_path / "out", 0) if name == "adapter_config.json" else open_policy(at(path))
    assert told in str(error.value)
    assert "root:" not in str(error.value)


def test_a_path_to_a_vocabulary_in_the_settings_of_a_tokenizer_is_not_followed(stored: Path, tmp_path: Path) -> None:
    """Old versions of transformers wrote where they had found it."""
    path = edited(stored, tmp_path / "old")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    named = {"tokenizer_file": "/dev/zero", "vocab_file": "/dev/zero", "name_or_path": "/dev/zero"}
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, **named}))
    assert open_tokenizer(path).get_vocab() == open_tokenizer(stored).get_vocab()


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "more.txt"])
def test_what_a_model_directory_holds_is_inside_and_regular(stored: Path, tmp_path: Path, name: str, kind: str) -> None:
    """Before anything of it is opened: a plan's source by the store, an imported model by the import."""
    path = edited(stored, tmp_path / "evil")
    odd = path / name
    odd.unlink(missing_ok=True)
    make = {"pipe": lambda: os.mkfifo(odd), "device": lambda: odd.symlink_to("/dev/zero")}
    make |= {"folder": lambda: odd.symlink_to(stored), "link": lambda: odd.symlink_to(stored / "config.json")}
    make[kind]()
    for act in (
        lambda: Store(tmp_path / "store").open_source(Policy, [path]),
        lambda: import_with_chat(path, tmp_path / "out", 0),
    ):
        with pytest.raises(UserError, match=rf"is not a regular file|'{name}' leaves its directory"):
            act()


def test_dropout_in_attention_is_refused_for_training_alone(stored: Path, tmp_path: Path) -> None:
    path = edited(stored, tmp_path / "dropout", {"attention_dropout": 0.1})
    open_policy(at(path))
    with pytest.raises(UserError, match=r"dropout/config.json: attention_dropout is 0.1.* set it to 0.0"):
        open_trainable(at(path), None, 0)


def test_pickles_are_refused(stored: Path, tmp_path: Path) -> None:
    path = edited(stored, tmp_path / "pickled")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin.*convert to safetensors"):
        open_policy(at(path))


def test_every_weight_must_be_there_and_have_a_place(stored: Path, tmp_path: Path) -> None:
    lost = edited(stored, tmp_path / "lost", weights=lambda w: {k: v for k, v in w.items() if "layers.1.mlp" not in k})
    with pytest.raises(UserError, match="3 weights are missing: model.layers.1.mlp.down_proj.weight"):
        open_policy(at(lost))
    more = edited(stored, tmp_path / "more", weights=lambda w: {**w, "model.layers.0.extra.weight": torch.ones(2)})
    with pytest.raises(UserError, match="1 weights have no place"):
        open_policy(at(more))
    old = edited(stored, tmp_path / "old", weights=lambda w: {**w, "model.rotary_emb.inv_freq": torch.ones(4)})
    open_policy(at(old))


def test_a_directory_without_a_tokenizer_is_named(stored: Path, tmp_path: Path) -> None:
    path = edited(stored, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / name).unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        open_tokenizer(path)


# --------------------------------------------------------------------------------------------------------- reward heads


def test_a_stored_head_is_loaded_and_never_initialised(stored: Path, tmp_path: Path, tokenizer) -> None:
    critic = open_trainable_classifier(at(stored), None, seed=3)
    moved(critic.model)
    scores = critic.module(FOREST).detach()
    save_model(critic.model, tokenizer, tmp_path / "rm")
    assert torch.equal(ScalarModel(open_classifier(at(tmp_path / "rm")).model)(FOREST), scores)
    again = open_trainable_classifier(at(tmp_path / "rm", "reward_model"), None, seed=4)
    assert torch.equal(again.module(FOREST), scores)
    with pytest.raises(UserError, match="missing: score.weight"):
        open_classifier(at(stored))
    with pytest.raises(UserError, match="missing: lm_head.weight"):
        open_policy(at(tmp_path / "rm"))


# ------------------------------------------------------------------------------------------------------------- adapters


def test_an_adapter_is_saved_alone_and_opened_over_the_base_of_its_digest(stored, tmp_path, tokenizer) -> None:
    trainable = open_trainable(at(stored), LORA, seed=0)
    assert trainable.base_digest == "base-digest" and trainable.module.training
    start = PolicyModel(policy(tokenizer))(FOREST).logprobs_T
    assert (trainable.module(FOREST).logprobs_T - start).abs().max() <= 1e-6  # the adapter starts at 0
    moved(trainable.model)
    expected = trainable.module(FOREST).logprobs_T.detach()
    assert (expected - start).abs().max() > 1e-2  # and is active
    save_model(trainable.model, tokenizer, tmp_path / "a", base_digest=trainable.base_digest)
    assert not (tmp_path / "a" / "model.safetensors").exists()
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base-digest"
    artifact = at(tmp_path / "a", digest="adapter-digest", base_digest=stored)
    opened = open_policy(artifact)
    assert opened.record["form"] == "adapter"
    assert torch.equal(PolicyModel(opened.model)(FOREST).logprobs_T, expected)
    on = open_trainable(artifact, None, seed=0)  # trained on as that adapter, on the same base
    assert on.base_digest == "base-digest"
    assert torch.equal(on.module(FOREST).logprobs_T, expected)
    assert any(p.requires_grad for p in on.model.parameters())
    with pytest.raises(UserError, match=r"\(kind lora, rank 4, alpha 8.0\).*\(kind lora, rank 2\).*adapter.beneath"):
        open_trainable(artifact, LoraSettings(rank=2), seed=0)
    with pytest.raises(UserError, match="digest of a model at hand"):
        open_policy(at(tmp_path / "a"))


def test_an_incomplete_adapter_is_refused(stored, tmp_path, tokenizer) -> None:
    trainable = open_trainable(at(stored), LORA, seed=0)
    save_model(trainable.model, tokenizer, tmp_path, base_digest="base-digest")
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    del weights[sorted(weights)[0]]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match="1 adapter weights are missing"):
        open_policy(at(tmp_path, base_digest=stored))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"r": 10**9}, "r and rank_pattern: whole numbers from 1 to 16384"),
        ({"r": True}, "r and rank_pattern"),
        ({"rank_pattern": {"q_proj": 10**9}}, "r and rank_pattern"),
        ({"rank_pattern": [10**9]}, "r and rank_pattern"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication"),
        ({"target_modules": 5}, "holds no model that can be opened"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "holds no model that can be opened"),
    ],
)
def test_an_adapter_that_asks_for_too_much_is_refused(stored, tmp_path, tokenizer, change: dict, told: str) -> None:
    save_model(open_trainable(at(stored), LORA, seed=0).model, tokenizer, tmp_path, base_digest="base-digest")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError) as error:
        open_policy(at(tmp_path, base_digest=stored))
    assert told in str(error.value) and str(tmp_path) in str(error.value)


def test_reward_adapters_carry_their_head(stored, tmp_path, tokenizer) -> None:
    critic = open_trainable_classifier(at(stored), LORA, seed=3)
    moved(critic.model)
    fold_scale(critic.model, 0.5, 2.0)
    scores = critic.module(FOREST).detach()
    save_model(critic.model, tokenizer, tmp_path / "rm", base_digest=critic.base_digest)
    artifact = at(tmp_path / "rm", "reward_model", base_digest=stored)
    assert torch.equal(ScalarModel(open_classifier(artifact).model)(FOREST), scores)
    assert torch.equal(open_trainable_classifier(artifact, None, 9).module(FOREST), scores)
    plain = open_trainable(at(stored), LORA, seed=0)
    save_model(plain.model, tokenizer, tmp_path / "a", base_digest="base-digest")
    with pytest.raises(UserError, match=r"score.*"):
        open_classifier(at(tmp_path / "a", base_digest=stored))


KINDS = {
    "lora": LORA,
    "dora": LoraSettings(rank=4, dora=True),
    "pissa": LoraSettings(rank=4, initial="pissa"),
    "ia3": Ia3Settings(kind="ia3"),
    "prefix": PrefixSettings(kind="prefix", tokens=3, projection=8),
    "prompt": PromptSettings(kind="prompt", tokens=3),
    "p-tuning": PTuningSettings(kind="p_tuning", tokens=3, hidden=8, encoder="lstm"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_beside_an_adapter_survives_save_load_and_merge(stored, tmp_path, tokenizer, kind: str) -> None:
    critic = open_trainable_classifier(at(stored), KINDS[kind], seed=3)
    moved(critic.model)
    head, scores = score_layer(critic.model).weight.detach().clone(), critic.module(FOREST).detach()
    save_model(critic.model, tokenizer, tmp_path, base_digest=critic.base_digest)
    artifact = at(tmp_path, "reward_model", base_digest=stored)
    opened, near = open_classifier(artifact).model, 1e-5 if kind == "pissa" else 0.0  # whose base was taken apart
    assert torch.equal(score_layer(opened).weight, head)
    assert (ScalarModel(opened)(FOREST) - scores).abs().max() <= near
    assert (open_trainable_classifier(artifact, None, 9).module(FOREST) - scores).abs().max() <= near
    if kind in ("prefix", "prompt", "p-tuning"):
        return
    plain = adapters.merged(opened)
    assert type(plain) is LlamaForSequenceClassification and torch.equal(plain.score.weight, head)
    assert (ScalarModel(plain)(FOREST) - scores).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["prefix", "prompt", "p-tuning"])
def test_stored_virtual_tokens_are_what_was_trained_and_train_on(stored, tmp_path, tokenizer, kind: str) -> None:
    """The network that computed them is not saved; they go on by themselves, in a reward model over them too."""
    trained = open_trainable(at(stored), KINDS[kind], seed=0)
    moved(trained.model)
    expected = trained.module(FOREST).logprobs_T.detach()
    save_model(trained.model, tokenizer, tmp_path, base_digest=trained.base_digest)
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == ["prompt_embeddings"]
    artifact = at(tmp_path, digest="adapter-digest", base_digest=stored)
    assert torch.equal(PolicyModel(open_policy(artifact).model)(FOREST).logprobs_T, expected)
    on = open_trainable(artifact, KINDS[kind], seed=9)
    assert torch.equal(on.module(FOREST).logprobs_T, expected)
    names = ["prompt_encoder.default.embedding.weight"]
    assert [name for name, p in on.model.named_parameters() if p.requires_grad] == names
    critic = open_trainable_classifier(artifact, None, seed=3)
    states = hidden_states(trained.model, FOREST)
    assert (critic.module(FOREST) - states @ score_layer(critic.model).weight[0]).abs().max() <= 1e-5
    trainable = {name for name, p in critic.model.named_parameters() if p.requires_grad}
    assert trainable == {*names, "base_model.score.modules_to_save.default.weight"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', expected one of LORA, IA3,"),
        ({"num_virtual_tokens": 10**9}, r"prompt_embeddings of shape (3, 32), expected (1000000000, 32)"),
        ({"token_dim": 10**9}, "prompt_embeddings of shape (3, 32), expected (3, 1000000000)"),
        ({"num_virtual_tokens": "3"}, "num_virtual_tokens, token_dim and num_layers: whole numbers"),
        ({"num_transformer_submodules": 2}, "prompt_embeddings of shape"),
        ({"peft_type": "PREFIX_TUNING"}, "prompt_embeddings of shape (3, 32), expected (3, 128)"),
    ],
)
def test_virtual_tokens_of_other_sizes_are_refused(stored, tmp_path, tokenizer, change: dict, told: str) -> None:
    model = open_trainable(at(stored), KINDS["prompt"], seed=0).model
    save_model(model, tokenizer, tmp_path, base_digest="base-digest")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError) as error:
        open_policy(at(tmp_path, base_digest=stored))
    assert told in str(error.value) and str(tmp_path) in str(error.value)


def test_what_was_trained_whole_beside_an_adapter_is_not_left_out(stored, tmp_path, tokenizer) -> None:
    """An embedding that somebody trained with a LoRA: merged with it, refused where it would be dropped."""
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(open_policy(at(stored)).model, config)
    moved(theirs)
    save_model(theirs, tokenizer, tmp_path, base_digest="base-digest")
    artifact = at(tmp_path, digest="adapter-digest", base_digest=stored)
    expected = PolicyModel(theirs)(FOREST).logprobs_T.detach()
    assert torch.equal(PolicyModel(open_policy(artifact).model)(FOREST).logprobs_T, expected)
    with pytest.raises(UserError, match=r"embed_tokens.*trained whole beside it"):
        open_trainable_classifier(artifact, None, seed=3)
    with pytest.raises(UserError, match=r"embed_tokens.*trained whole beside it"):
        open_trainable(artifact, LoraSettings(rank=2, beneath="stack"), seed=3)
    over = open_trainable(artifact, LoraSettings(rank=2, beneath="merge"), seed=3)
    assert (over.module(FOREST).logprobs_T - expected).abs().max() <= 1e-5
    critic = open_trainable_classifier(artifact, LoraSettings(rank=2, beneath="merge"), seed=3)
    states = hidden_states(theirs, FOREST)
    assert (critic.module(FOREST) - states @ score_layer(critic.model).weight[0]).abs().max() <= 1e-5


def test_a_reward_model_over_an_adapted_policy_starts_from_its_adapter(stored, tmp_path, tokenizer) -> None:
    trainable = open_trainable(at(stored), LORA, seed=0)
    moved(trainable.model)
    save_model(trainable.model, tokenizer, tmp_path / "a", base_digest="base-digest")
    artifact = at(tmp_path / "a", digest="adapter-digest", base_digest=stored)
    critic = open_trainable_classifier(artifact, None, seed=3)
    assert critic.base_digest == "base-digest"
    states = trainable.model.get_base_model().model
    hidden = states(FOREST.ids_T[None, :4]).last_hidden_state[0, -1]
    expected = hidden @ score_layer(critic.model).weight[0]
    assert (critic.module(FOREST)[3] - expected).abs() <= 1e-5
    names = {n.split(".")[-3] for n, p in critic.model.named_parameters() if p.requires_grad}
    assert names == {"lora_A", "lora_B", "modules_to_save"}
