"""Chat templates that came with somebody else's tokenizer: masks from the template itself, or a refusal.

The whole conversation is rendered once as text. Where each assistant turn lies is taken from the rendering of
the messages before it (with the generation prompt) and after it: both must be a prefix of the whole. Where
the template marks its generations, the marks must cover the same answers. Text is compared after the
template's own normalisation: trimming of each turn, found by trying (`trims`), which belongs in a model's
lineage.

Refused, each with a reason: a clock in the template; control tokens spelled in a message; a rendering that is
not prefix-stable; an answer that does not appear in its own turn; a turn without an end token; a template that runs on
(jinja's sandbox bounds one range, not loops within loops; what a template allocates is bounded by nothing).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.data.records import Conversation, Message
from pipeline.data.template import as_dict, message_text
from pipeline.flow.errors import UserError

if TYPE_CHECKING:
    from pipeline.data.chat import Rendered

_CLOCKS = re.compile(r"\b(strftime_now|raise_if_old|now|today|datetime)\s*\(")
_PROBE = " \n probe text \n "
MOST_STEPS = 1_000_000  # lines that a template's program may run through in one rendering


class TemplateRefused(UserError):
    """A conversation that this template does not render in a way that can be masked safely."""


@contextmanager
def _bounded() -> Iterator[None]:
    """Steps are counted, not timed, so a template ends alike on every machine."""
    left = MOST_STEPS

    def step(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        left -= event == "line"
        if left < 0:
            raise TemplateRefused(f"it runs through more than {MOST_STEPS:,} lines of its program")
        return step

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: step if frame.f_code.co_filename == "<template>" else None)
    try:
        yield
    finally:
        sys.settrace(before)


class ForeignTemplate:
    """Rendering by a tokenizer's own chat template. `variables` are its further settings."""

    def __init__(self, tokenizer: Any, variables: dict[str, Any]) -> None:
        template = tokenizer.chat_template
        if not isinstance(template, str) or not template:
            raise UserError(
                "the tokenizer has no chat template: `rlhf import chat MODEL OUT` makes a copy of the model with one"
            )
        clock = _CLOCKS.search(template)
        if clock:
            raise UserError(
                f"the tokenizer's chat template calls {clock.group(1)}(): the same conversation would have "
                "other ids tomorrow; set a fixed date in the template"
            )
        self.tokenizer = tokenizer
        self.variables = variables
        self.marks = "{% generation" in template or "{%- generation" in template
        self._controls = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._is_control = set(tokenizer.get_added_vocab().values())
        probe = (Message("user", "q"), Message("assistant", _PROBE))
        whole, before = self._text(probe), self._text(probe[:1], prompt=True)
        self.trims = _PROBE not in whole
        body = self.normalised(_PROBE)
        at = whole.find(body, len(before))
        rest = whole[at + len(body) :]
        ends = [i for i in self._ids(rest) if i in self._is_control] if at >= 0 else []
        if not ends:
            raise UserError("the tokenizer's chat template ends no answer with a control token: it would never stop")
        self.end_id: int = ends[0]
        self._lead, self._tail = whole[len(before) : at], rest.partition(tokenizer.decode([self.end_id]))[0]

    def normalised(self, text: str) -> str:
        return text.strip() if self.trims else text

    def answer(self, text: str) -> str:
        """The text as it stands between the assistant's header and the end token."""
        return self._lead + self.normalised(text) + self._tail

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        self._refuse_controls(conversation)
        return self._ids(self._text(conversation.messages, conversation.tools, prompt=True))

    def render(self, conversation: Conversation, train_on: str) -> Rendered:
        """Ids, mask and rounds of the whole rendering. Raises TemplateRefused naming the record."""
        from pipeline.data.chat import Rendered, trained_turns

        self._refuse_controls(conversation)
        where = conversation.source or "a conversation"
        messages, tools = conversation.messages, conversation.tools
        whole = self._text(messages, tools)
        encoding = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoding["input_ids"]), encoding["offset_mapping"]
        mask = [0] * len(ids)
        spans: list[tuple[int, int]] = []
        for i, carries in enumerate(trained_turns(messages, train_on)):
            if messages[i].role != "assistant":
                continue
            prompt = self._text(messages[:i], tools, prompt=True)
            if not whole.startswith(prompt):
                raise TemplateRefused(f"{where}: turn {i}: what sampling would be prompted with is no prefix")
            first = self._ids(prompt)
            if ids[: len(first)] != first:
                raise TemplateRefused(f"{where}: turn {i}: the tokens of the prompt change with the answer")
            last = self._answer_end(messages[i], ids, len(first), f"{where}: turn {i}")
            spans.append((offsets[len(first)][0], offsets[last - 1][1]))
            if carries:
                mask[len(first) : last] = [1] * (last - len(first))
        if self.marks:
            self._check_marks(conversation, whole, spans, where)
        return Rendered(ids, mask, self._rounds(conversation, whole, offsets), conversation, train_on)

    # The template

    def _text(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), prompt: bool = False) -> str:
        given, offered = [as_dict(m) for m in messages], [dict(t) for t in tools] or None
        try:
            with _bounded():
                return self.tokenizer.apply_chat_template(
                    given,
                    tools=offered,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **self.variables,
                )
        except Exception as error:  # a stranger's program: it may fail like any
            raise TemplateRefused(f"the tokenizer's chat template refuses these messages: {error}") from error

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _refuse_controls(self, conversation: Conversation) -> None:
        for i, message in enumerate(conversation.messages):
            text = message_text(message)
            spelled = next((c for c in self._controls if c in text), None)
            if spelled is not None:
                raise TemplateRefused(
                    f"{conversation.source or 'a conversation'}: turn {i} spells the control token "
                    f"{spelled!r}, which this tokenizer's template cannot keep as text"
                )

    def _answer_end(self, message: Message, ids: list[int], start: int, where: str) -> int:
        """One past the end token of the answer that starts at `start`; what is decoded must be the answer."""
        last = next((i for i in range(start, len(ids)) if ids[i] == self.end_id), None)
        if last is None:
            raise TemplateRefused(f"{where}: the answer has no end token")
        said = self.tokenizer.decode(ids[start:last], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if message.tool_calls or not isinstance(message.content, str):
            return last + 1  # the template has its own words for these: prefixes and the end token are all there is
        expected = self.normalised(message.content)
        if (self.normalised(said) if self.trims else said) != expected:
            raise TemplateRefused(f"{where}: the template renders the answer {expected[:60]!r} as {said[:60]!r}")
        return last + 1

    def _check_marks(self, conversation: Conversation, whole: str, spans: list[tuple[int, int]], where: str) -> None:
        """Every answer must lie within one of the template's own generation marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendering: Any = render_jinja_template(
            conversations=[[as_dict(m) for m in conversation.messages]],
            tools=[dict(t) for t in conversation.tools] or None,
            chat_template=self.tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.variables},
        )
        marked = rendering[1]
        end = len(self.tokenizer.convert_ids_to_tokens(self.end_id))
        if len(spans) != len(marked[0]):
            raise TemplateRefused(f"{where}: {len(spans)} answers, but {len(marked[0])} generation marks")
        for (a, b), (low, high) in zip(spans, marked[0], strict=True):
            if whole[min(a, low) : max(a, low)].strip() or high < b - end:
                raise TemplateRefused(f"{where}: the template's generation marks cover {whole[low:high][:60]!r}")

    def _rounds(self, conversation: Conversation, whole: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
        messages = conversation.messages
        starts = [
            self._round_start(conversation, whole, i) for i, message in enumerate(messages) if message.role == "user"
        ]
        return [sum(start <= low for start in starts) - 1 for low, _ in offsets]

    def _round_start(self, conversation: Conversation, whole: str, i: int) -> int:
        """Where turn `i` begins in the rendering; 0 where a template puts the system text into the first
        turn."""
        answered = any(m.role == "assistant" for m in conversation.messages[:i])
        try:
            before = self._text(conversation.messages[:i], conversation.tools) if i else ""
        except TemplateRefused:
            if answered:
                raise
            return 0
        if whole.startswith(before):
            return len(before)
        if answered:
            raise TemplateRefused(f"{conversation.source or 'a conversation'}: not prefix-stable at turn {i}")
        return 0
