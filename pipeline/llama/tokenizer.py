"""Tokenizers: trained on the documents, or opened from what others published; a chat format by name stored with them.

    tokenizer = train_tokenizer(texts, vocab_size=2048)            byte-level BPE; kind="bpe", kind="unigram"
    tokenizer = open_pieces(path)                   SentencePiece model, tiktoken ranks (Llama 3) or tokenizer.json
    added = add_chat_tokens(tokenizer, "llama-3")   the format's tokens and template; the embedding must grow
    encode_texts(tokenizer, ["Hi <|user|>"])        control tokens spelled in text stay text

Ids of a tokenizer trained here: pad, bos, eos, the tokens of the chat format (0 to 7 with our own), those of a
pretraining objective, if it has any, with bpe and unigram one for unknown characters, the 256 bytes, merges or pieces.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.data.template import BOS, CONTROL_TOKENS, EOS, PAD, encode_texts
from pipeline.data.templates import TEMPLATES, known_template
from pipeline.flow.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "BYTES_AND_CONTROL",
    "TokenizerKind",
    "add_chat_tokens",
    "add_tokens",
    "encode_texts",
    "from_sentencepiece",
    "from_tiktoken",
    "from_tokenizer_json",
    "open_pieces",
    "require_vocabulary",
    "smallest_vocabulary",
    "stop_tokens",
    "train_tokenizer",
]

TokenizerKind = Literal["byte_bpe", "bpe", "unigram"]
BYTES_AND_CONTROL = 256 + len(CONTROL_TOKENS)
ROLES = ("bos", "eos", "pad", "unk")

# The split of GPT-4's cl100k_base, which is Llama 3's too: letters, at most three digits together, punctuation, white
# space. Digits in threes let a small number be one token. Punctuation and letters never merge, so no merge can spell
# "<|user|>".
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Behind the ranks of a tiktoken file, under the names of Llama 3.1 and in the order of transformers'
# convert_llama_weights_to_hf.py; Llama 3 reserves what it has no name for, and both agree in the others' ids.
_LLAMA3_NAMED = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
)  # fmt: skip
LLAMA3_TOKENS = (*_LLAMA3_NAMED, *(f"<|reserved_special_token_{i}|>" for i in range(3, 256 - len(_LLAMA3_NAMED) + 3)))
_PROBES = ("Once upon a time, Lily's 12 cats ran.\n", "caf\u00e9 \u7ea2\u697c\u68a6", "x\ty", "a <s> <0x0A> <unk> z")


# ------------------------------------------------------------------------------------------------------------- training


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    kind: TokenizerKind = "byte_bpe",
    template: str = "own",
    more: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """A tokenizer over `texts` with the tokens of a chat format at its first ids, and `more` of them after these.

    byte_bpe: merges of bytes. bpe, unigram: SentencePiece's, digits apart and bytes for what it does not know, as
    LLaMA's, but without a space in front of a text; U+2581, their sign for a space, comes back as one.

    The same texts in the same order give the same tokenizer. The result may hold fewer than `vocab_size` tokens where
    the texts have no more pairs to merge. Raises UserError where `vocab_size` cannot hold bytes and controls.
    """
    control = (PAD, BOS, EOS, *TEMPLATES[template].control, *more)
    least = smallest_vocabulary(kind, template, more)
    if vocab_size < least:
        raise UserError(
            f"tokenizer.vocab_size is {vocab_size}, but 256 bytes and {least - 256} control "
            f"tokens need {least}: raise tokenizer.vocab_size"
        )
    backend = _byte_bpe(texts, vocab_size, control) if kind == "byte_bpe" else None
    backend = backend or _pieces(texts, vocab_size, control, kind)
    for number, token in enumerate(control):
        if backend.token_to_id(token) != number:
            raise AssertionError(f"{token} has id {backend.token_to_id(token)}, expected {number}")
    return _wrapped(
        backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(control[3:]),
        chat_template=TEMPLATES[template].jinja,
    )


def smallest_vocabulary(kind: str, template: str, more: Sequence[str] = ()) -> int:
    """Bytes and control tokens; SentencePiece has one for unknown characters beside them."""
    return 256 + 3 + len(TEMPLATES[template].control) + len(more) + (kind != "byte_bpe")


def _wrapped(backend: Any, **arguments: Any) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **arguments)


def _byte_bpe(texts: Iterable[str], vocab_size: int, control: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    _split_bytes(backend)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(control),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _split_bytes(backend: Any) -> None:
    from tokenizers import Regex, decoders, pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()


def _pieces(texts: Iterable[str], vocab_size: int, control: Sequence[str], kind: str) -> Any:
    """SentencePiece trained on lines; a line feed is always a byte, as in LLaMA's, and rare characters are too."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    lines = _lines(list(texts), (vocab_size - 257 - len(control)) // 2)
    if not lines:
        raise UserError(f"tokenizer.vocab_size is {vocab_size}: no text, or no room for characters beside the bytes")
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            character_coverage=1.0,
            model_type=kind,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 30,
            num_threads=1,  # sums of several have an order of their own
            minloglevel=2,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=len(control),
            pad_piece=control[0],
            bos_piece=control[1],
            eos_piece=control[2],
            control_symbols=list(control[3:]),
        )
    except RuntimeError as problem:
        raise UserError(f"SentencePiece trains no {kind} of {vocab_size} tokens on these texts: {problem}") from problem
    with tempfile.NamedTemporaryFile(suffix=".model") as file:
        file.write(model.getvalue())
        file.flush()
        backend, _ = _from_model(Path(file.name))
        return backend


def _lines(texts: Sequence[str], most: int) -> list[str]:
    """The lines of the texts, cut where a character stands that is not among the `most` frequent ones."""
    counts = Counter(chain.from_iterable(texts))
    del counts["\n"]
    rare = dict.fromkeys(map(ord, sorted(counts, key=lambda c: (-counts[c], c))[max(most, 0) :]), "\n")
    return [line for text in texts for line in text.translate(rare).split("\n") if line]


# -------------------------------------------------------------------------------------------------------------- opening


def open_pieces(path: Path, roles: Mapping[str, str] | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer file of another project, told by its content. `roles` names bos, eos and pad of a tokenizer.json."""
    with path.open("rb") as file:
        begin = file.read(256)
    if begin.lstrip()[:1] == b"{":
        return from_tokenizer_json(path, roles or {})
    if roles:
        raise UserError(f"{path}: names its own bos, eos and pad; they are given for a tokenizer.json only")
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", begin):
        return from_tiktoken(path)
    return from_sentencepiece(path)


def from_sentencepiece(path: Path) -> PreTrainedTokenizerFast:
    """A SentencePiece model (LLaMA 1 and 2, llama2.c), BPE or Unigram, as a fast tokenizer without a chat template.

    Where the model asks for it a space is put before every run of text and taken away again by decoding, so text that
    begins with spaces survives. Raises UserError for a model that does not give every text back (a normalisation of
    its own, no bytes for what it does not know), and where ids differ from SentencePiece's own on some probes.
    """
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(str(path))
        backend, proto = _from_model(path)
    except (RuntimeError, OSError, ValueError) as problem:
        raise UserError(f"{path}: no SentencePiece model, tiktoken ranks or tokenizer.json ({problem})") from problem
    if proto.normalizer_spec.precompiled_charsmap or not proto.trainer_spec.byte_fallback:
        why = f"its normalisation {proto.normalizer_spec.name!r} rewrites text"
        why = why if proto.normalizer_spec.precompiled_charsmap else "it has no bytes for characters it does not know"
        raise UserError(f"{path}: {why}: a text would not come back from its ids; LLaMA's do neither")
    ids = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id(), "pad": model.pad_id()}
    tokenizer = _wrapped(backend, **{f"{name}_token": model.id_to_piece(i) for name, i in ids.items() if i >= 0})
    if len(tokenizer) != len(model):
        raise UserError(f"{path}: {len(model)} SentencePiece pieces became {len(tokenizer)} tokens")
    for probe in _PROBES:
        if encode_texts(tokenizer, [probe])[0] != model.encode(probe):
            raise UserError(f"{path}: this SentencePiece model changes text in a way that is not carried over")
    return tokenizer


def _from_model(path: Path) -> tuple[Any, Any]:
    """(backend, protocol buffer) by transformers' converters, with the model's own rule for spaces in front."""
    from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
    from transformers.convert_slow_tokenizer import SentencePieceExtractor, SpmConverter

    extractor = SentencePieceExtractor(str(path))
    proto = extractor.proto
    if proto.trainer_spec.model_type not in (1, 2):
        raise UserError(f"{path}: a SentencePiece model of words or characters; BPE and Unigram can be read")
    apart = {p.piece for p in proto.pieces if p.type not in (1, 4)}  # control, unknown and bytes: never made from text
    found: Any = extractor.extract(None)
    merges = [m for m in found.get("merges", ()) if "".join(m) not in apart]
    backend = SpmConverter.build_tokenizer_from_spm_proto(proto, found["vocab"], merges)
    table = json.loads(backend.to_str())
    space: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]
    if proto.normalizer_spec.add_dummy_prefix:
        space.insert(0, {"type": "Prepend", "prepend": "\u2581"})
        table["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    table["normalizer"] = {"type": "Sequence", "normalizers": space}
    backend = Tokenizer.from_str(json.dumps(table))
    unigram = proto.trainer_spec.model_type == 1
    if unigram:  # it has no merges to leave out: such a piece is cut behind its first character
        spelled = "|".join(f"{re.escape(p[0])}(?={re.escape(p[1:])})" for p in sorted(apart) if len(p) > 1)
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(spelled), "isolated")
    named = [p for p in proto.pieces if p.type in (2, 3, 4)]
    backend.add_tokens([AddedToken(p.piece, normalized=False, special=p.type != 4) for p in named])
    return backend, proto


def from_tiktoken(path: Path) -> PreTrainedTokenizerFast:
    """Llama 3's file (a token in base64 and its rank, line by line) with its split and its special tokens behind it."""
    from tokenizers import AddedToken
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Ranks(TikTokenConverter):
        """Without the package tiktoken, which keeps copies of files by their path."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return _ranks(Path(tiktoken_url))

    backend = Ranks(str(path)).tokenizer()
    _split_bytes(backend)
    backend.add_tokens([AddedToken(token, normalized=False, special=True) for token in LLAMA3_TOKENS])
    return _wrapped(
        backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<|finetune_right_pad_id|>",
        additional_special_tokens=list(LLAMA3_TOKENS),
    )


def _ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as problem:
            raise UserError(f"{path}, line {number}: no tiktoken rank ({problem})") from problem
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise UserError(f"{path}: its ranks are not 0 to {len(ranks) - 1}, or a byte has none: no whole tiktoken file")
    return ranks


def from_tokenizer_json(path: Path, roles: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """A bare tokenizer.json. Which tokens begin, end and pad is not in it: the file beside it says, or `roles`."""
    from tokenizers import Tokenizer

    beside = path.parent / "tokenizer_config.json"
    if not roles and beside.is_file():
        from pipeline.llama.open import open_tokenizer

        return open_tokenizer(path.parent)  # type: ignore[no-any-return]
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as problem:  # the library raises Exception itself
        raise UserError(f"{path}: holds no tokenizer that can be opened: {problem}") from problem
    if "eos" not in roles:
        raise UserError(f"{path}: does not say which token ends a text; name it, and bos and pad where there are any")
    for role, token in roles.items():
        if backend.token_to_id(token) is None:
            raise UserError(f"{path}: has no token {token!r} ({role})")
    return _wrapped(backend, **{f"{role}_token": token for role, token in roles.items()})


# --------------------------------------------------------------------------------------------------------------- adding


def add_chat_tokens(tokenizer: Any, template: str = "own", *, replace: bool = False) -> list[str]:
    """Give a tokenizer a chat format by name, in place; returns the tokens that were added to it.

    Existing bos, eos and pad tokens are kept. The model's embeddings must grow to `len(tokenizer)`
    afterwards. Raises UserError where it already has a template of its own, unless that is to be replaced.
    """
    if tokenizer.chat_template and not replace:
        raise UserError("this tokenizer has a chat template of its own: use it as it is")
    wanted = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    missing = {name: token for name, token in wanted.items() if getattr(tokenizer, name) is None}
    turns = list(TEMPLATES[template].control)
    vocabulary = tokenizer.get_vocab()
    kept = [t for t in tokenizer.extra_special_tokens if t not in turns]
    tokenizer.add_special_tokens({**missing, "additional_special_tokens": kept + turns})
    tokenizer.chat_template = TEMPLATES[template].jinja
    return [t for t in (*missing.values(), *turns) if t not in vocabulary]


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> list[str]:
    """Add words that are one token from now on, in place; returns those that were not there yet."""
    from tokenizers import AddedToken, Regex, decoders

    vocabulary = tokenizer.get_vocab()
    new = [t for t in dict.fromkeys(tokens) if t not in vocabulary]
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in new])
    backend, probe = tokenizer.backend_tokenizer, "".join(f"{t}b" for t in new)
    if tokenizer.decode(encode_texts(tokenizer, [probe])[0]) != probe:  # SentencePiece's space in front of "b" as well
        behind = Regex("(?<=" + "|".join(map(re.escape, new)) + ") ")
        backend.decoder = decoders.Sequence([backend.decoder, decoders.Replace(behind, "")])
    return new


def require_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raises UserError where the tokenizer can make an id that the model's embedding does not have."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        raise UserError(
            f"the tokenizer makes ids up to {highest}, the model's embedding has {vocab_size} rows: this "
            "tokenizer does not belong to this model, or the embedding must be resized first"
        )


def stop_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer, for `generation_config.eos_token_id`: end of turn, what else stops, end of document."""
    found = known_template(tokenizer)
    tokens = (found.end, *found.stops, tokenizer.eos_token) if found else (tokenizer.eos_token,)
    known = tokenizer.get_vocab()
    return tuple(dict.fromkeys(known[t] for t in tokens if t in known))
