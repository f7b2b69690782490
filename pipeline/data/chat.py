"""Conversations to ids, loss mask and round numbers, made together so that they cannot drift apart.

    ids     <|bos|> <|system|> Be brief. <|end|> <|user|> Hi <|end|> <|assistant|> Hello. <|end|>
    mask       0        0        0 0        0       0      0     0         0          1  1     1
    rounds    -1       -1       -1 -1      -1       0      0     0         0          0  0     0

A round is a user turn with everything up to the next one; bos and the system turn belong to none (-1).
Only an assistant's text and its end of turn can be trained: tool results, users and the system never are.

Our own template (template.py) is rendered piece by piece here; a template that came with a foreign tokenizer
goes through foreign.py, with the same invariants checked on every conversation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pipeline.data.records import Conversation, Document, Message
from pipeline.data.template import (
    CONTROL_TOKENS,
    END,
    HEADERS,
    encode_texts,
    is_own_template,
    message_text,
    tools_text,
)
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

    `variables` are passed to a foreign template; ours has none. Raises UserError for a tokenizer without a
    chat template, and for a template that reads the clock.
    """

    def __init__(self, tokenizer: Any, variables: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.foreign = None
        if not is_own_template(tokenizer):
            from pipeline.data.foreign import ForeignTemplate

            self.foreign = ForeignTemplate(tokenizer, dict(variables or {}))
        elif variables:
            raise UserError(f"template variables {sorted(variables)}: the project's own chat template has none")
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        self.end_id: int = self.foreign.end_id if self.foreign else vocabulary[END]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((self.end_id, self.eos_id)))
        named = [t for t in CONTROL_TOKENS if t in vocabulary] + list(tokenizer.all_special_tokens)
        self._control = frozenset(vocabulary[t] for t in named)
        self.control_ids = self._control | {*self.stop_ids}
        self._headers = {role: vocabulary.get(token) for role, token in HEADERS.items()}

    # Conversations

    def render(self, conversation: Conversation, train_on: str = "all_rounds") -> Rendered:
        return self.render_all([conversation], train_on)[0]

    def render_all(self, conversations: Sequence[Conversation], train_on: str = "all_rounds") -> list[Rendered]:
        """Every conversation rendered, texts encoded in one batch. A mask may be all 0: `require_trained`
        checks."""
        if self.foreign:
            return [self.foreign.render(c, train_on) for c in conversations]
        table = self._encode(text for c in conversations for text in _turn_texts(c) if text)
        return [self._assemble(c, train_on, table) for c in conversations]

    def _encode(self, texts: Iterable[str]) -> dict[str, list[int]]:
        unique = list(dict.fromkeys(texts))
        return dict(zip(unique, encode_texts(self.tokenizer, unique), strict=True))

    def _assemble(self, conversation: Conversation, train_on: str, table: Mapping[str, list[int]]) -> Rendered:
        messages = conversation.messages
        carries = trained_turns(messages, train_on)
        ids: list[int] = []
        mask: list[int] = []
        rounds: list[int] = []
        round_number = -1

        def add(piece: list[int], trained: int) -> None:
            ids.extend(piece)
            mask.extend([trained] * len(piece))
            rounds.extend([round_number] * len(piece))

        if self.bos_id is not None:
            add([self.bos_id], 0)
        texts = _turn_texts(conversation)
        if len(texts) > len(messages):  # tools without a system turn of their own
            add([self._header("system"), *table[texts.pop(0)], self.end_id], 0)
        for message, carry, text in zip(messages, carries, texts, strict=True):
            round_number += message.role == "user"
            add([self._header(message.role)], 0)
            add([*(table[text] if text else ()), self.end_id], int(carry))
        return Rendered(ids, mask, rounds, conversation, train_on)

    def _header(self, role: str) -> int:
        token = self._headers.get(role)
        if token is None:
            raise UserError(f"role {role!r} has no control token in this tokenizer")
        return token

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
        header = self._header("assistant")
        return [[*rendered.ids, header] for rendered in self.render_all(conversations)]

    def completion_ids(self, text: str, finished: bool = True) -> list[int]:
        """The ids of an answer, with its end of turn where it is finished."""
        return self.completions_ids([text], finished)[0]

    def completions_ids(self, texts: Sequence[str], finished: bool = True) -> list[list[int]]:
        if self.foreign:
            texts = [self.foreign.answer(text) for text in texts]
        end = [self.end_id] if finished else []
        return [ids + end for ids in encode_texts(self.tokenizer, texts)]

    def document_ids(self, document: Document) -> list[int]:
        return self.documents_ids([document])[0]

    def documents_ids(self, documents: Sequence[Document]) -> list[list[int]]:
        """bos, the text or the rendered dialogue, eos; every token is trained."""
        head = [] if self.bos_id is None else [self.bos_id]
        plain = iter(encode_texts(self.tokenizer, [d.text or "" for d in documents if not d.messages]))
        spoken = iter(self.render_all([Conversation(d.messages) for d in documents if d.messages]))
        return [[*(next(spoken).ids if d.messages else head + next(plain)), self.eos_id] for d in documents]

    # Length

    def truncate(self, rendered: Rendered, max_tokens: int) -> tuple[Rendered | None, int]:
        """At most `max_tokens` tokens, by removing whole rounds; the system turn stays.

        Unanswered rounds at the end go first, as no token of theirs is trained; then the oldest. Returns
        (None, rounds removed) where no round with a trained token fits: the record is dropped, and counted.
        """
        if len(rendered) <= max_tokens:
            return (rendered, 0) if rendered.trained else (None, 0)
        if self.foreign:
            return self.foreign.truncate(rendered, max_tokens)
        total = max(rendered.rounds, default=-1) + 1
        length, trained = [0] * (total + 1), [0] * (total + 1)  # the last entry is that of round -1
        for number, one in zip(rendered.rounds, rendered.mask, strict=True):
            length[number] += 1
            trained[number] += one
        kept = list(range(total))
        while kept and not trained[kept[-1]]:
            kept.pop()
        while kept and length[-1] + sum(length[r] for r in kept) > max_tokens:
            kept.pop(0)
        if not any(trained[r] for r in kept):
            return None, total
        keep = {-1, *kept}
        rows = [row for row in zip(rendered.ids, rendered.mask, rendered.rounds, strict=True) if row[2] in keep]
        ids, mask, rounds = (list(column) for column in zip(*rows, strict=True))
        return Rendered(ids, mask, rounds, rendered.conversation, rendered.train_on), total - len(kept)

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

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without control tokens; runs between control tokens are decoded one by one."""
        return self.decode_all([ids])[0]

    def decode_all(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        runs: list[list[int]] = []
        owner: list[int] = []
        for number, ids in enumerate(sequences):
            run: list[int] = []
            for i in (*ids, self.end_id):
                if int(i) not in self._control:
                    run.append(int(i))
                elif run:
                    runs.append(run)
                    owner.append(number)
                    run = []
        texts = [""] * len(sequences)
        decoded = self.tokenizer.backend_tokenizer.decode_batch(runs, skip_special_tokens=False)
        for number, text in zip(owner, decoded, strict=True):
            texts[number] += text
        return texts


def _turn_texts(conversation: Conversation) -> list[str]:
    """The text of each turn; the tools end the system turn, or make one, which then comes first."""
    texts = [message_text(m) for m in conversation.messages]
    tools = tools_text(conversation.tools)
    if not tools:
        return texts
    if conversation.messages and conversation.messages[0].role == "system":
        return [texts[0] + tools, *texts[1:]]
    return [tools, *texts]


def require_trained(rendered: Rendered) -> Rendered:
    """The same, or NothingToTrain naming the conversation's file and line."""
    if rendered.trained:
        return rendered
    source = rendered.conversation.source if rendered.conversation else None
    raise NothingToTrain(
        f"{source or 'a conversation'}: no token would be trained under train_on: {rendered.train_on}; "
        "it has no assistant turn that carries loss"
    )
