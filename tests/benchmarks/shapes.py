"""The two sizes that everything beside SFT is measured at, their weights as files, and their operations by hand.

Both sides open the same safetensors: `save_models` writes a policy and a reward model, made of a seed alone, with a
tokenizer of words w0, w1, ... beside them. Of every token that is sampled freely about one in `ANSWER` is the stop
token, so that answers end by themselves after mixed lengths without any training.

An operation is one addition or multiplication of a matrix product; what is not a product counts as nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STOP = 7  # the end of a turn among the control tokens of the project's own template
FREE = 8  # ids from here on are words
ANSWER = 64  # mean length of an answer that nothing cuts


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A LLaMA with grouped queries. Legend of the counts: T tokens, n heads, w width of a head."""

    hidden: int = 64
    layers: int = 5
    heads: int = 8
    kv_heads: int = 4
    vocabulary: int = 512

    @property
    def intermediate(self) -> int:
        return self.hidden * 8 // 3 // 32 * 32

    @property
    def width(self) -> int:
        return self.hidden // self.heads

    def trunk(self, tokens: float, seen: float) -> float:
        """Operations of a forward pass below the head; `seen` counts pairs of a token and one it attends to."""
        attention = self.hidden * self.width * (2 * self.heads + 2 * self.kv_heads)
        weights = self.layers * (attention + 3 * self.hidden * self.intermediate)
        return 2.0 * weights * tokens + 4.0 * self.layers * self.heads * self.width * seen

    def head(self, tokens: float) -> float:
        return 2.0 * self.hidden * self.vocabulary * tokens

    def reading(self, prompt: int, answers: Sequence[int]) -> float:
        """Trunk operations of a prompt, computed once, and of all the answers that continue it."""
        seen = pairs(0, prompt) + sum(pairs(prompt, n) for n in answers)
        return self.trunk(prompt + sum(answers), seen)

    def sampling(self, prompt: int, answers: Sequence[int]) -> float:
        """The least that decoding needs: every token but an answer's last is read once, every answer token drawn."""
        return self.reading(prompt, [n - 1 for n in answers]) + self.head(sum(answers))

    def config(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 2048,
            "bos_token_id": 1,
            "eos_token_id": STOP,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
        }


SMALL = {"hidden": 64, "layers": 5, "heads": 8, "kv_heads": 4, "vocabulary": 512}
LARGER = {"hidden": 256, "layers": 6, "heads": 8, "kv_heads": 4, "vocabulary": 4096}
SMOKE = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "vocabulary": 128}


def shapes(small: bool) -> dict[str, dict[str, int]]:
    return {"smoke": SMOKE} if small else {"hidden 64": SMALL, "hidden 256": LARGER}


def pairs(before: int, tokens: int) -> float:
    """Pairs of a token and one it attends to, itself included, of `tokens` tokens that `before` others precede."""
    return tokens * before + tokens * (tokens + 1) / 2


def tokenizer(vocabulary: int, pad: str | None = None) -> Any:
    """The project's control tokens and template over words; `pad` names another pad token, with the next free id.

    >>> tokenizer(512)("<|bos|> w8 w511").input_ids
    [1, 8, 511]
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from pipeline.data.template import BOS, CHAT_TEMPLATE, CONTROL_TOKENS, END, PAD

    words = {**{token: i for i, token in enumerate(CONTROL_TOKENS)}, **{f"w{i}": i for i in range(FREE, vocabulary)}}
    if pad:
        words[pad] = vocabulary
    inner = Tokenizer(models.WordLevel(words, unk_token=f"w{FREE}"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=BOS,
        eos_token=END,
        pad_token=pad or PAD,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def save_models(shape: Shape, folder: Path) -> None:
    """folder/policy and folder/reward: transformers' LLaMA with weights that depend on the seed alone.

    The first hidden number is a constant through all layers and only the stop token's row of the head reads it: the
    stop token's logit stands so far above the others that it is drawn once in `ANSWER` times.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    policy = LlamaForCausalLM(LlamaConfig(**shape.config()))
    reward = LlamaForSequenceClassification(LlamaConfig(**shape.config(), num_labels=1))
    with torch.no_grad():
        policy.model.embed_tokens.weight[:, 0] = 1.0
        for layer in policy.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        policy.lm_head.weight[:, 0] = 0.0
        policy.lm_head.weight[STOP] = 0.0
        # so that exp(logit) of the stop token is that of all others together, over ANSWER - 1
        states = policy.model(torch.tensor(draw_ids(shape.vocabulary, [128] * 4, seed=5))).last_hidden_state
        logits = policy.lm_head(states)
        logits[..., STOP] = -math.inf
        wanted = logits.logsumexp(-1).mean() - math.log(ANSWER - 1)
        policy.lm_head.weight[STOP, 0] = wanted / states[..., 0].mean()
    policy.generation_config.eos_token_id = None  # who stops says so
    for model, name in ((policy, "policy"), (reward, "reward")):
        model.save_pretrained(folder / name)
        tokenizer(shape.vocabulary).save_pretrained(folder / name)


def draw_ids(vocabulary: int, lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Words of a sequence of each length; the first is the begin token."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    return [[1, *torch.randint(FREE, vocabulary, (n - 1,), generator=draw).tolist()] for n in lengths]


def draw_lengths(shortest: int, longest: int, count: int, seed: int) -> list[int]:
    import torch

    return torch.randint(shortest, longest + 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass(frozen=True)
class Files:
    """What the project's `open_...` functions need of an artifact: a directory of plain files."""

    path: Path
    kind: str
    digest: str = "benchmark"
    bases: Any = None
    lineage: Any = None

    def __post_init__(self) -> None:
        for name in ("bases", "lineage"):
            object.__setattr__(self, name, {})


def policy_files(folder: str) -> Files:
    return Files(Path(folder) / "policy", "policy")


def reward_files(folder: str) -> Files:
    return Files(Path(folder) / "reward", "reward_model")
