"""Records to groups of segments: what each stage trains on, laid out for a forest.

Groups keep together what must share a micro-batch: a comparison's prompt with all of its completions, a prompt
with all of its samples. The prompt is one segment and is computed once for everything that continues it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.data.chat import ChatFormat, require_trained
from pipeline.data.forest import Forest, Group, Segment
from pipeline.data.records import Comparison, Conversation, Document, Message
from pipeline.flow.errors import UserError


@dataclass
class Encoded:
    """Groups with what was lost on the way: `kept[i]` is the record that `groups[i]` came from."""

    groups: list[Group] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    dropped: int = 0  # records that did not fit into max_tokens at all
    ties: int = 0  # comparisons without any preference
    shortened: int = 0  # records that lost whole rounds

    def add(self, record: int, group: Group) -> None:
        self.groups.append(group)
        self.kept.append(record)

    def required(self, slot: str, max_tokens: int) -> Encoded:
        """Itself. UserError where no record is left of what the slot gave."""
        if self.groups:
            return self
        reasons = [f"{self.dropped} longer than max_tokens={max_tokens}"] if self.dropped else []
        reasons += [f"{self.ties} ties without a preference"] if self.ties else []
        raise UserError(f"{slot}: no record is left to use ({', '.join(reasons) or 'none has a token to predict'})")


def document_groups(documents: Sequence[Document], chat: ChatFormat, max_tokens: int) -> Encoded:
    """One root segment a document, cut into windows of `max_tokens`; a window's first token is not predicted."""
    encoded = Encoded()
    for number, ids in enumerate(chat.documents_ids(documents)):
        for at in range(0, len(ids), max_tokens):
            window = ids[at : at + max_tokens]
            if len(window) > 1:
                encoded.add(number, [Segment(window, weights=[0.0] + [1.0] * (len(window) - 1))])
        encoded.shortened += len(ids) > max_tokens
    return encoded


def conversation_groups(
    conversations: Sequence[Conversation], chat: ChatFormat, max_tokens: int, train_on: str
) -> Encoded:
    """One segment a conversation, weights from its mask, the round of each token beside them.

    Raises NothingToTrain naming file and line where no token of a conversation carries loss.
    """
    encoded = Encoded()
    for number, whole in enumerate(chat.render_all(conversations, train_on=train_on)):
        rendered, lost = chat.truncate(require_trained(whole), max_tokens)
        if rendered is None:
            encoded.dropped += 1
            continue
        encoded.shortened += lost > 0
        rounds = [float(r) for r in rendered.rounds]
        weights = [float(m) for m in rendered.mask]
        encoded.add(number, [Segment(rendered.ids, weights=weights, tokens={"round": rounds})])
    return encoded


def comparison_groups(comparisons: Sequence[Comparison], chat: ChatFormat, max_tokens: int) -> Encoded:
    """[prompt] <- [y1] ... [yK], every completion's tokens with weight 1.

    Facts: `answer` 1 marks completions, `worth` is their place from the worst, 0, up, ties sharing one (not the score:
    facts are float32, in which close scores become ties). A comparison whose prompt and longest completion exceed
    `max_tokens` is dropped and counted: cutting an answer would change what was judged. So is one of ties alone.
    """
    encoded = Encoded()
    prompts = chat.prompts_ids([c.prompt for c in comparisons])
    texts = iter(chat.completions_ids([y.text for c in comparisons for y in c.completions]))
    for number, (comparison, prompt) in enumerate(zip(comparisons, prompts, strict=True)):
        answers = [next(texts) for _ in comparison.completions]
        if not comparison.pairs():
            encoded.ties += 1
            continue
        if len(prompt) + max(map(len, answers)) > max_tokens:
            encoded.dropped += 1
            continue
        worth = comparison.worth()
        places = {w: float(place) for place, w in enumerate(sorted(set(worth)))}
        facts = [{"answer": 1.0, "worth": places[w]} for w in worth]
        encoded.add(number, continuations(prompt, answers, facts))
    return encoded


def continuations(
    prompt: Sequence[int],
    answers: Sequence[Sequence[int]],
    facts: Sequence[Mapping[str, float]] | None = None,
    tokens: Sequence[Mapping[str, Sequence[float]]] | None = None,
) -> Group:
    """A prompt and the answers that continue it; the answers' tokens weigh 1. Facts and token values by answer."""
    facts = facts or [{"answer": 1.0}] * len(answers)
    tokens = tokens or [{}] * len(answers)
    return [
        Segment(prompt),
        *(
            Segment(a, parent=0, weights=[1.0] * len(a), tokens=t, facts=f)
            for a, f, t in zip(answers, facts, tokens, strict=True)
        ),
    ]


def answers(forest: Forest) -> Tensor:
    """[N] segment numbers of the answers, in order."""
    return torch.nonzero(forest.facts["answer"] > 0).squeeze(1)


def sum_by_segment(values_T: Tensor, forest: Forest) -> Tensor:
    """[S] sums of a value by token over each segment."""
    return values_T.new_zeros(forest.start_S.numel()).index_add(0, forest.segment_T, values_T)


def as_conversation(prompt: Sequence[Message], answer: str) -> Conversation:
    return Conversation(messages=(*prompt, Message("assistant", answer)))
