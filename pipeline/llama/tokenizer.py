"""Tokenizers: byte-level BPE trained on the documents, its chat template stored with it.

    tokenizer = train_tokenizer(texts, vocab_size=2048)
    encode_texts(tokenizer, ["Hi <|user|>"])      # control tokens spelled in text stay text

Ids 0 to 7 are the control tokens, then come those of a pretraining objective, if it has any, the 256 bytes, and merges.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.template import BOS, CHAT_TEMPLATE, CONTROL_TOKENS, END, EOS, PAD, encode_texts
from pipeline.flow.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "BYTES_AND_CONTROL",
    "add_chat_tokens",
    "encode_texts",
    "from_sentencepiece",
    "require_vocabulary",
    "stop_tokens",
    "train_tokenizer",
]

BYTES_AND_CONTROL = 256 + len(CONTROL_TOKENS)

# The split of GPT-4's cl100k_base: letters, at most three digits together, punctuation, white space. Digits
# in threes let a small number be one token. Punctuation and letters never merge, so no merge can spell
# "<|user|>".
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, chat_template: str = CHAT_TEMPLATE, more: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts` with the control tokens at ids 0..7, and `more` of them after these.

    The same texts in the same order give the same tokenizer. The result may hold fewer than `vocab_size`
    tokens where the texts have no more pairs to merge. Raises UserError where `vocab_size` cannot hold bytes
    and controls.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    control = (*CONTROL_TOKENS, *more)
    if vocab_size < 256 + len(control):
        raise UserError(
            f"tokenizer.vocab_size is {vocab_size}, but 256 bytes and {len(control)} control "
            f"tokens need {256 + len(control)}: raise tokenizer.vocab_size"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(control),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    for number, token in enumerate(control):
        if backend.token_to_id(token) != number:
            raise AssertionError(f"{token} has id {backend.token_to_id(token)}, expected {number}")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(control[3:]),
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def add_chat_tokens(tokenizer: Any) -> list[str]:
    """Give a tokenizer without a chat template ours, in place; returns the tokens that were added to it.

    Existing bos, eos and pad tokens are kept. The model's embeddings must grow to `len(tokenizer)`
    afterwards. Raises UserError where it already has a template of its own.
    """
    if tokenizer.chat_template:
        raise UserError("this tokenizer has a chat template of its own: use it as it is")
    vocabulary = tokenizer.get_vocab()
    wanted = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    missing = {name: token for name, token in wanted.items() if getattr(tokenizer, name) is None}
    turns = [t for t in CONTROL_TOKENS[3:] if t not in vocabulary]
    tokenizer.add_special_tokens({**missing, "additional_special_tokens": list(CONTROL_TOKENS[3:])})
    tokenizer.chat_template = CHAT_TEMPLATE
    return [t for t in missing.values() if t not in vocabulary] + turns


def from_sentencepiece(path: Path) -> PreTrainedTokenizerFast:
    """A SentencePiece BPE model (LLaMA 1 and 2, llama2.c) as a fast tokenizer without a chat template.

    A space is put before every run of text, as SentencePiece does, and taken away again by decoding, so text
    that begins with spaces survives. Raises UserError where its ids differ from SentencePiece's own on some
    probes (a model with a text normalisation of its own).
    """
    import sentencepiece
    from tokenizers import Tokenizer
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    model = sentencepiece.SentencePieceProcessor(str(path))
    ids = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id(), "pad": model.pad_id()}
    roles: dict[str, Any] = {f"{name}_token": model.id_to_piece(i) for name, i in ids.items() if i >= 0}
    table = json.loads(LlamaTokenizer.from_pretrained(str(path), **roles).backend_tokenizer.to_str())
    table["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ],
    }
    table["pre_tokenizer"] = table["post_processor"] = None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(table)),
        **roles,
        clean_up_tokenization_spaces=False,
    )
    if len(tokenizer) != len(model):
        raise UserError(f"{path}: {len(model)} SentencePiece pieces became {len(tokenizer)} tokens")
    for probe in ("Once upon a time, Lily's 12 cats ran.\n", "caf\u00e9 \u7ea2\u697c\u68a6", "x\ty"):
        if encode_texts(tokenizer, [probe])[0] != model.encode(probe):
            raise UserError(f"{path}: this SentencePiece model changes text in a way that is not carried over")
    return tokenizer


def require_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raises UserError where the tokenizer can make an id that the model's embedding does not have."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        raise UserError(
            f"the tokenizer makes ids up to {highest}, the model's embedding has {vocab_size} rows: this "
            "tokenizer does not belong to this model, or the embedding must be resized first"
        )


def stop_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer, for `generation_config.eos_token_id`: end of turn, then end of document."""
    ids = (tokenizer.convert_tokens_to_ids(END), tokenizer.eos_token_id)
    known = tokenizer.get_vocab()
    return tuple(i for i, token in zip(ids, (END, tokenizer.eos_token), strict=True) if token in known)
