"""Chat formats and tokenizers through the chain: learned in SFT, kept by every later row, with the right stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.chat import ChatFormat
from pipeline.data.records import Document, Prompt
from pipeline.data.templates import TEMPLATES
from pipeline.flow.config import parse_settings
from pipeline.flow.errors import UserError
from pipeline.llama.open import open_frozen, open_policy, open_tokenizer
from pipeline.rollout.collect import Sampler, encode_prompts
from pipeline.rollout.engine import SamplingSettings
from pipeline.rollout.noise import NoiseKey
from stages.pretrain import Pretrain
from stages.sft import Sft
from tests.small import ask, policy, save
from tests.stages.rows import ANSWERS, QUESTIONS, Place, train

NAMES = [name for name in TEMPLATES if name != "own"]
FAST = ["llama-2", "llama-3.1"]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def base(place: Place) -> Any:
    return save(place.root / "base", "policy", policy().model)


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n not in FAST)])
def test_a_policy_learns_to_answer_and_to_stop_in_a_format(place: Place, base: Any, name: str) -> None:
    """T2: overfitted on eight answers; all eight end at the right place by themselves."""
    inputs = {"policy": base, "conversations": place.demonstrations()}
    row = place.run("sft", inputs, train=train(epochs=60), template=name)
    role = open_frozen(row.out["policy"])
    assert role.chat.template is TEMPLATES[name]
    kept = json.loads((row.out["policy"].path / "generation_config.json").read_text())["eos_token_id"]
    assert tuple(kept if isinstance(kept, list) else [kept]) == role.chat.stop_ids
    asked = encode_prompts([Prompt(q, ask(q)) for q in QUESTIONS], role.chat, 200, 30)
    settings = SamplingSettings(temperature=0, max_new_tokens=30)
    found = Sampler(role.model, role.chat, settings, NoiseKey(0, "t")).sample(asked).samples
    assert [s.text for s in found] == ANSWERS
    assert all(s.stopped and s.ids[-1] == role.chat.end_id for s in found)


SHORT = {"samples": 4, "max_new_tokens": 30}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama-2", "unigram"),
        *(pytest.param(name, "bpe", marks=pytest.mark.slow) for name in TEMPLATES),
        *(pytest.param(name, "byte_bpe", marks=pytest.mark.slow) for name in NAMES),
    ],
)
def test_every_row_of_the_chain_keeps_the_format(place: Place, name: str, kind: str) -> None:
    texts = [Document(f"{q} {a}, said Mira of Dovan.") for q in QUESTIONS for a in ANSWERS]
    pretrain = place.run(
        "pretrain", {"documents": place.data("documents", texts)}, model="test", vocab_size=400, tokenizer=kind,
        template=name, train=train(steps=2, batch_tokens=512),
    )  # fmt: skip
    pairs, prompts = place.pairs(), place.prompts()
    first = pretrain.out["policy"]
    sft = place.run("sft", {"policy": first, "conversations": place.demonstrations()}, train=train(epochs=40))
    start = sft.out["policy"]
    reward = place.run(
        "reward", {"policy": start, "comparisons": pairs, "prompts": prompts}, train=train(steps=2), max_new_tokens=8
    ).out["model"]
    asked = {"policy": start, "reward": reward, "prompts": prompts}
    rows = [
        pretrain,
        sft,
        place.run("ppo", asked, iterations=1, prompts=4, minibatch=4, sampling=SHORT, train=train()),
        place.run("rejection", asked, sampling=SHORT, train=train(steps=2)),
        place.run("dpo", {"policy": start, "comparisons": pairs}, train=train(steps=2)),
    ]
    facts = {(row.out["policy"].lineage["tokenizer"], row.out["policy"].lineage["template"]) for row in rows}
    assert len(facts) == 1
    assert all(ChatFormat(open_tokenizer(row.out["policy"])).template is TEMPLATES[name] for row in rows)
    assert rows[-1].log[0]["loss"] == pytest.approx(0.6931471806, rel=1e-6)
    assert rows[2].log[0]["first_ratio"] == 1.0


def test_words_added_in_sft_are_one_token_and_old_rows_keep_their_bits(place: Place, base: Any) -> None:  # T10
    words = ["<think>", "</think>"]
    inputs = {"policy": base, "conversations": place.demonstrations()}
    row = place.run("sft", inputs, train=train(epochs=1, learning_rate=1e-30, weight_decay=0.0), add_tokens=words)
    before, after = open_policy(base).model, open_policy(row.out["policy"])
    rows = before.get_input_embeddings().weight.shape[0]
    assert [len(after.tokenizer(w)["input_ids"]) for w in words] == [1, 1]
    assert after.model.config.vocab_size == rows + 2 == len(after.tokenizer)
    for old, new in (
        (before.get_input_embeddings().weight, after.model.get_input_embeddings().weight),
        (before.get_output_embeddings().weight, after.model.get_output_embeddings().weight),
    ):
        assert torch.equal(new[:rows], old)
        # the mean of the old rows, and noise of a tenth of their spread
        away = (new[rows:] - old.mean(0)) / old.std(0)
        assert new.shape[0] == rows + 2 and 0.05 < away.std() < 0.15
    text = "so <think>x</think>, sir"
    ids = ChatFormat(after.tokenizer).completion_ids(text)
    assert {rows, rows + 1} < set(ids) and ChatFormat(after.tokenizer).decode(ids) == text
    assert max(ids) < after.model.config.vocab_size


def test_new_rows_under_an_adapter_are_refused(place: Place, base: Any) -> None:
    inputs = {"policy": base, "conversations": place.demonstrations()}
    for change in ({"template": "chatml"}, {"add_tokens": ["<think>"]}):
        with pytest.raises(UserError, match="new to this model, and an adapter would neither train nor keep"):
            place.run("sft", inputs, train=train(), adapter={"rank": 2}, **change)
    row = place.run("sft", inputs, train=train(), adapter={"rank": 2}, template="alpaca")  # has no tokens of its own
    assert ChatFormat(open_tokenizer(row.out["policy"])).template is TEMPLATES["alpaca"]


def test_the_settings_are_no_part_of_a_rows_identity_at_their_defaults() -> None:
    """Rows that were sealed before there were these settings keep their fingerprints."""
    new = {"tokenizer", "template", "add_tokens"}
    assert not new & {*Pretrain.Config().identity(), *Sft.Config().identity()}
    chosen = {**Pretrain.Config(tokenizer="bpe", template="own").identity(), **Sft.Config(add_tokens=["a"]).identity()}
    assert new <= chosen.keys()


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(UserError, match="pretrain.tokenizer: none is trained where one is given"):
        Pretrain.check(Pretrain.Config(tokenizer="bpe"), frozenset({"documents", "tokenizer"}))
    with pytest.raises(UserError, match="pretrain.vocab_size: 264, .* are 265; raise it"):
        Pretrain.check(Pretrain.Config(tokenizer="unigram", vocab_size=264), frozenset({"documents"}))
    with pytest.raises(UserError, match="sft.template.*'own', 'chatml'"):
        parse_settings(Sft.Config, {"template": "vicuna"}, "sft")


def test_a_given_tokenizer_is_given_the_format_that_is_named(place: Place, base: Any) -> None:
    from tests.small import artifact, chat

    chat().tokenizer.save_pretrained(place.root / "pieces")
    inputs = {
        "documents": place.data("documents", [Document("Mira lives in Dovan.")]),
        "tokenizer": artifact(place.root / "pieces", "tokenizer"),
    }
    row = place.run("pretrain", inputs, model="test", template="chatml", train=train(steps=1, batch_tokens=64))
    found = open_policy(row.out["policy"])
    assert ChatFormat(found.tokenizer).template is TEMPLATES["chatml"]
    assert found.model.config.vocab_size == len(found.tokenizer) == 264 + 2
