"""Conversations to ids, loss mask and round numbers, made together so that they cannot drift apart.

    ids     <|bos|> <|system|> Be brief. <|end|> <|user|> Hi <|end|> <|assistant|> Hello. <|end|>
    mask       0        0        0 0        0       0      0     0         0          1  1     1
    rounds    -1       -1       -1 -1      -1       0      0     0         0          0  0     0

A round is a user turn with everything up to the next one; bos and the system turn belong to none (-1).
Only an assistant's text and its end of turn can be trained: tool results, users and the system never are.

A format known by name (templates.py) is rendered piece by piece here; a template that came with a foreign tokenizer
goes through foreign.py, with the same invariants checked on every conversation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from pipeline.data.records import Conversation, Document, Message
from pipeline.data.template import CONTROL_TOKENS, encode_texts, encode_with, without_prefix
from pipeline.data.templates import Piece, known_template
from pipeline.flow.errors import UserError

TrainOn = Literal["all_rounds", "last_round", "marked"]
"""Which assistant turns carry loss: of every round, of the last answered round, or those not marked with
weight 0."""


class NothingToTrain(UserError):
    """A conversation in which no token would be trained."""


@dataclass(slots=True)
class Rendered:
    """Aligned lists, one entry a token: id, 1 where it is trained, and its round (-1: bos and system)."""

    ids: list[int]
    mask: list[int]
    rounds: list[int]
    conversation: Conversation | None = field(default=None, repr=False, compare=False)
    train_on: str = field(default="all_rounds", repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained(self) -> int:
        return sum(self.mask)


def split_rounds(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """(what stands before the first user turn, the rounds)."""
    head: list[Message] = []
    rounds: list[list[Message]] = []
    for message in messages:
        if message.role == "user":
            rounds.append([message])
        else:
            (rounds[-1] if rounds else head).append(message)
    return head, rounds


def trained_turns(messages: Sequence[Message], train_on: str) -> list[bool]:
    """For each message, whether it carries loss."""
    if train_on not in get_args(TrainOn):
        raise UserError(f"train_on: {train_on!r} is none of {', '.join(get_args(TrainOn))}")
    answers = [m.role == "assistant" for m in messages]
    if train_on == "marked":
        return [a and m.weight != 0 for a, m in zip(answers, messages, strict=True)]
    if train_on == "last_round" and any(answers):
        last = len(answers) - 1 - answers[::-1].index(True)
        users = [i for i in range(last) if messages[i].role == "user"]
        start = users[-1] if users else 0
        return [a and i > start for i, a in enumerate(answers)] if users else answers
    return answers


def fit_pair(prompt: int, answer: int, limit: int) -> tuple[int, int]:
    """Token counts to keep of a prompt and its answer so that both fit in `limit`.

    A side shorter than half the limit is kept whole; two long sides share the limit in proportion.
    The same table as LLaMA-Factory's infer_seqlen.
    """
    if 2 * answer < limit:
        room = limit
    elif 2 * prompt < limit:
        room = limit - prompt
    else:
        room = int(limit * (answer / (prompt + answer)))
    kept = min(room, answer)
    return min(max(limit - kept, 0), prompt), kept


class ChatFormat:
    """What turns records into ids for one tokenizer.

    `variables` are passed to a foreign template; a named one has none. Raises UserError for a tokenizer without a
    chat template, and for a template that reads the clock.
    """

    def __init__(self, tokenizer: Any, variables: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = known_template(tokenizer)
        self.foreign = None
        if self.template is None:
            from pipeline.data.foreign import ForeignTemplate

            self.foreign = ForeignTemplate(tokenizer, dict(variables or {}))
        elif variables:
            name = self.template.name
            raise UserError(f"template variables {sorted(variables)}: the chat format {name!r} has none")
        self._vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        self._bos, self._eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
        self.end_id, stops = self._ends()
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((self.end_id, *stops, self.eos_id)))
        named = [t for t in CONTROL_TOKENS if t in self._vocabulary] + list(tokenizer.all_special_tokens)
        self._control = frozenset(self._vocabulary[t] for t in named)
        self.control_ids = self._control | {*self.stop_ids}
        # What encodes and decodes text that continues text, such as an answer behind "answer:".
        self._continuing = tokenizer.backend_tokenizer
        self._answers_continue = bool(self.template and self.template.answer_follows_text(self._eos))
        if self._answers_continue:
            self._continuing = without_prefix(tokenizer.backend_tokenizer)
        # transformers' LLaMA tokenizers put no space in front of a text with one, but take one away in decoding.
        self._drops_space = self.decode(encode_texts(tokenizer, [" a"])[0]) == "a"

    def _ends(self) -> tuple[int, list[int]]:
        if self.foreign:
            return self.foreign.end_id, []
        assert self.template is not None
        return self._vocabulary[self.template.end or self._eos], [self._vocabulary[t] for t in self.template.stops]

    # Conversations

    def render(self, conversation: Conversation, train_on: str = "all_rounds") -> Rendered:
        return self.render_all([conversation], train_on)[0]

    def render_all(self, conversations: Sequence[Conversation], train_on: str = "all_rounds") -> list[Rendered]:
        """Every conversation rendered, texts encoded in one batch. A mask may be all 0: `require_trained`
        checks."""
        if self.foreign:
            return [self.foreign.render(c, train_on) for c in conversations]
        laid_out = self._encoded([self._pieces(c) for c in conversations])
        return [self._assemble(c, train_on, ids) for c, ids in zip(conversations, laid_out, strict=True)]

    def _pieces(self, conversation: Conversation, prompt: bool = False) -> list[Piece]:
        assert self.template is not None
        return self.template.pieces(conversation, self._bos, self._eos, prompt)

    def _encoded(self, layouts: Sequence[Sequence[Piece]]) -> list[list[tuple[Piece, list[int]]]]:
        """Each piece with its ids; every text is encoded once."""
        control: dict[str, list[int]] = {}
        fresh: dict[str, list[int]] = {}  # texts behind a control token
        continuing: dict[str, list[int]] = {}  # texts behind text
        found = []
        for pieces in layouts:
            row: list[tuple[Piece, list[int]]] = []
            texts = fresh
            for piece in pieces:
                if piece.control:
                    row.append((piece, control.setdefault(piece.text, [])))
                    texts = fresh
                else:
                    row.append((piece, texts.setdefault(piece.text, [])))
                    texts = continuing
            found.append(row)
        for token, ids in control.items():
            ids.append(self._vocabulary[token])
        for texts, encode in ((fresh, self._begin), (continuing, self._continue)):
            for ids, encoded in zip(texts.values(), encode(list(texts)), strict=True):
                ids.extend(encoded)
        return found

    def _begin(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts behind a control token."""
        if self._drops_space:
            texts = [f" {text}" if text.startswith(" ") else text for text in texts]
        return encode_texts(self.tokenizer, texts)

    def _continue(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts behind text."""
        return encode_with(self._continuing, texts)

    def _assemble(
        self, conversation: Conversation, train_on: str, laid_out: Iterable[tuple[Piece, list[int]]]
    ) -> Rendered:
        carries = trained_turns(conversation.messages, train_on)
        round_of = [-1]  # of what stands before turn 0, then of each turn
        for message in conversation.messages:
            round_of.append(round_of[-1] + (message.role == "user"))
        rendered = Rendered([], [], [], conversation, train_on)
        all_ids, mask, rounds = rendered.ids, rendered.mask, rendered.rounds
        for (_, turn, _, answer), ids in laid_out:
            all_ids += ids
            mask += [int(answer and carries[turn])] * len(ids)
            rounds += [round_of[turn + 1]] * len(ids)
        return rendered

    # Prompts, answers, documents

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """What sampling is prompted with: the rendered messages and the assistant's header."""
        return self.prompts_ids([messages], tools)[0]

    def prompts_ids(
        self, prompts: Sequence[Sequence[Message]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[list[int]]:
        conversations = [Conversation(tuple(messages), tuple(tools)) for messages in prompts]
        if self.foreign:
            return [self.foreign.prompt_ids(c) for c in conversations]
        laid_out = self._encoded([self._pieces(c, prompt=True) for c in conversations])
        return [[i for _, ids in pieces for i in ids] for pieces in laid_out]

    def completion_ids(self, text: str, finished: bool = True) -> list[int]:
        """The ids of an answer, with its end of turn where it is finished."""
        return self.completions_ids([text], finished)[0]

    def completions_ids(self, texts: Sequence[str], finished: bool = True) -> list[list[int]]:
        answer = self.foreign.answer if self.foreign else self.template.answer  # type: ignore[union-attr]
        encode = self._continue if self._answers_continue else self._begin
        end = [self.end_id] if finished else []
        return [ids + end for ids in encode([answer(text) for text in texts])]

    def document_ids(self, document: Document) -> list[int]:
        return self.documents_ids([document])[0]

    def documents_ids(self, documents: Sequence[Document]) -> list[list[int]]:
        """bos, the text or the rendered dialogue, eos; every token is trained."""
        head = [] if self.bos_id is None else [self.bos_id]
        plain = iter(encode_texts(self.tokenizer, [d.text or "" for d in documents if not d.messages]))
        spoken = iter(self.render_all([Conversation(d.messages) for d in documents if d.messages]))
        found = [(next(spoken).ids if d.messages else head + next(plain), bool(d.messages)) for d in documents]
        return [ids if said and ids[-1] == self.eos_id else [*ids, self.eos_id] for ids, said in found]

    # Length

    def truncate(self, rendered: Rendered, max_tokens: int) -> tuple[Rendered | None, int]:
        """At most `max_tokens` tokens, by removing whole rounds; the system turn stays.

        Unanswered rounds at the end go first, as no token of theirs is trained; then the oldest. Returns
        (None, rounds removed) where no round with a trained token fits: the record is dropped, and counted.
        """
        if len(rendered) <= max_tokens:
            return (rendered, 0) if rendered.trained else (None, 0)
        total = max(rendered.rounds, default=-1) + 1
        length, trained = [0] * (total + 1), [0] * (total + 1)  # the last entry is that of round -1
        for number, one in zip(rendered.rounds, rendered.mask, strict=True):
            length[number] += 1
            trained[number] += one
        kept = list(range(total))
        while kept and not trained[kept[-1]]:
            kept.pop()
        if not (self.template and self.template.apart):
            return self._shorter(rendered, kept, max_tokens, total)
        while kept and length[-1] + sum(length[r] for r in kept) > max_tokens:
            kept.pop(0)
        if not any(trained[r] for r in kept):
            return None, total
        keep = {-1, *kept}
        rows = [row for row in zip(rendered.ids, rendered.mask, rendered.rounds, strict=True) if row[2] in keep]
        ids, mask, rounds = (list(column) for column in zip(*rows, strict=True))
        return Rendered(ids, mask, rounds, rendered.conversation, rendered.train_on), total - len(kept)

    def _shorter(
        self, rendered: Rendered, kept: Sequence[int], max_tokens: int, total: int
    ) -> tuple[Rendered | None, int]:
        """Rendered again: the format puts the system text into the first round, counts rounds, or is a stranger's."""
        assert rendered.conversation is not None
        head, rounds = split_rounds(rendered.conversation.messages)
        for first in range(len(kept)):
            messages = (*head, *(m for r in kept[first:] for m in rounds[r]))
            shorter = self.render(replace(rendered.conversation, messages=messages), rendered.train_on)
            if shorter.trained and len(shorter) <= max_tokens:
                return shorter, total - len(kept) + first
        return None, total

    def prompt_within(self, messages: Sequence[Message], max_tokens: int) -> tuple[list[int] | None, int]:
        """Prompt ids of at most `max_tokens` tokens, oldest rounds removed; None where the last alone is too
        long."""
        head, rounds = split_rounds(messages)
        for dropped in range(max(len(rounds), 1)):
            ids = self.prompt_ids([*head, *(m for r in rounds[dropped:] for m in r)])
            if len(ids) <= max_tokens:
                return ids, dropped
        return None, len(rounds)

    # Back to text

    def answers(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """The texts of sampled answers: decoded, without the white space that the format puts around them."""
        trims = self.foreign.trims if self.foreign else self.template.trims  # type: ignore[union-attr]
        texts = self.decode_all(sequences)
        return [text.strip() for text in texts] if trims else texts

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without control tokens; runs between control tokens are decoded one by one."""
        return self.decode_all([ids])[0]

    def decode_all(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        texts = [""] * len(sequences)
        whole: list[tuple[int, list[int]]] = []  # runs behind a control token, with the sequence that they are of
        continuing: list[tuple[int, list[int]]] = []  # those of an answer that continues its header
        for number, ids in enumerate(sequences):
            run: list[int] = []
            runs = continuing if self._answers_continue else whole
            for i in (*ids, self.end_id):
                if int(i) not in self._control:
                    run.append(int(i))
                    continue
                if run:
                    runs.append((number, run))
                    run = []
                runs = whole
        for runs, backend in ((continuing, self._continuing), (whole, self.tokenizer.backend_tokenizer)):
            decoded = backend.decode_batch([run for _, run in runs], skip_special_tokens=False)
            for (number, _), text in zip(runs, decoded, strict=True):
                texts[number] += text
        return texts


def require_trained(rendered: Rendered) -> Rendered:
    """The same, or NothingToTrain naming the conversation's file and line."""
    if rendered.trained:
        return rendered
    source = rendered.conversation.source if rendered.conversation else None
    raise NothingToTrain(
        f"{source or 'a conversation'}: no token would be trained under train_on: {rendered.train_on}; "
        "it has no assistant turn that carries loss"
    )
