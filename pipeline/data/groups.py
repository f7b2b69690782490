"""Records to groups of segments: what each stage trains on, laid out for a forest.

Groups keep together what must share a micro-batch: a comparison's prompt with all of its completions, a prompt
with all of its samples. The prompt is one segment and is computed once for everything that continues it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pipeline.algo.output import keep
from pipeline.data.chat import ChatFormat, require_trained
from pipeline.data.forest import Forest, Group, Segment
from pipeline.data.records import Comparison, Conversation, Document, Message, Rated
from pipeline.flow.errors import UserError


@dataclass
class Encoded:
    """Groups with what was lost on the way: `kept[i]` is the record that `groups[i]` came from."""

    groups: list[Group] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    dropped: int = 0  # records that did not fit into max_tokens at all
    ties: int = 0  # comparisons without any preference
    shortened: int = 0  # records that lost whole rounds
    made: dict[str, int] = field(default_factory=dict)  # windows by what a pretraining objective did with them

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


def comparison_groups(
    comparisons: Sequence[Comparison], chat: ChatFormat, max_tokens: int, *, mark_control: bool = False
) -> Encoded:
    """[prompt] <- [y1] ... [yK], every completion's tokens with weight 1.

    Facts: `answer` 1 marks completions, `worth` is their place from the worst, 0, up, ties sharing one (not the score:
    facts are float32, in which close scores become ties). A comparison whose prompt and longest completion exceed
    `max_tokens` is dropped and counted: cutting an answer would change what was judged. So is one of ties alone.
    With `mark_control` the control tokens of answers (end of turn) are 1 in the tokens' value `control`, which leaves
    them out of `answer_sums`.
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
        group = continuations(prompt, answers, facts)
        encoded.add(number, [_marked(s, chat) for s in group] if mark_control else group)
    return encoded


def _marked(segment: Segment, chat: ChatFormat) -> Segment:
    return replace(segment, tokens={**segment.tokens, "control": [float(i in chat.control_ids) for i in segment.ids]})


def rated_groups(records: Sequence[Rated | Comparison], chat: ChatFormat, max_tokens: int) -> Encoded:
    """[prompt] <- [answer] [unrelated answer]: what KTO trains on, and what it measures its reference point with.

    Facts: `answer` 1 and `desirable` 1 or 0 on the answer; `unrelated` 1 on the answer to another prompt, which follows
    from the records alone (`unrelated_answers`) and is cut to `max_tokens`. An answer that does not fit is dropped and
    counted.

    A comparison is split as the paper splits pairs: its best answers are desirable, its worst ones undesirable, what
    stands between them says neither and is left out. One of ties alone is left out and counted. UserError where all
    answers are to one prompt.
    """
    encoded = Encoded()
    singles: list[tuple[int, Rated]] = []
    for number, record in enumerate(records):
        parts = split_comparison(record) if isinstance(record, Comparison) else [record]
        encoded.ties += not parts
        singles += [(number, part) for part in parts]
    prompts = chat.prompts_ids([r.prompt for _, r in singles])
    answers = chat.completions_ids([r.completion for _, r in singles])
    fits = [i for i in range(len(singles)) if len(prompts[i]) + len(answers[i]) <= max_tokens]
    encoded.dropped = len(singles) - len(fits)
    others = unrelated_answers([prompts[i] for i in fits])
    for i, other in zip(fits, others, strict=True):
        unrelated = answers[fits[other]][: max_tokens - len(prompts[i])]
        number, record = singles[i]
        facts = [
            {"answer": 1.0, "desirable": float(record.desirable), "unrelated": 0.0},
            {"answer": 0.0, "desirable": 0.0, "unrelated": 1.0},
        ]
        encoded.add(number, continuations(prompts[i], [answers[i], unrelated], facts))
    return encoded


def split_comparison(comparison: Comparison) -> list[Rated]:
    """Its best answers as desirable, its worst as undesirable ones; nothing where all are tied."""
    worth = comparison.worth()
    best, worst = max(worth), min(worth)
    if best == worst:
        return []
    return [
        Rated(comparison.prompt, y.text, w == best, comparison.source)
        for y, w in zip(comparison.completions, worth, strict=True)
        if w in (best, worst)
    ]


def unrelated_answers(prompts: Sequence[Sequence[int]]) -> list[int]:
    """For each record the number of another one, whose prompt differs: the next of all the others in turn.

    Where every prompt has equally many answers this is a permutation, so the unrelated answers are the answers
    themselves in another order; with one answer each it is the cyclic shift of the KTO paper. UserError for one prompt.
    """
    blocks: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        blocks.setdefault(tuple(prompt), []).append(number)
    if len(blocks) == 1:
        raise UserError(
            f"all {len(prompts)} rated answers are to one prompt: the reference point of KTO is measured with answers "
            "to other prompts; give records of at least two"
        )
    order = [number for block in blocks.values() for number in block]
    found, end = [0] * len(order), 0
    for block in blocks.values():
        end += len(block)
        for place, number in enumerate(block):
            found[number] = order[(end + place % (len(order) - len(block))) % len(order)]
    return found


def only(group: Group, fact: str) -> Group:
    """The roots of a group and those of their children that have the fact (`answer`, `unrelated`)."""
    return [s for s in group if s.parent < 0 or s.facts.get(fact)]


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


def answer_sums(logprobs_T: Tensor, forest: Forest) -> tuple[Tensor, Tensor]:
    """[S] summed log-probs of each segment and [S] how many tokens that are, without marked control tokens."""
    if "control" not in forest.tokens:
        return sum_by_segment(logprobs_T, forest), forest.length_S
    text_T = forest.tokens["control"] == 0
    return sum_by_segment(keep(logprobs_T, text_T), forest), sum_by_segment(text_T.long(), forest)


def sum_by_segment(values_T: Tensor, forest: Forest) -> Tensor:
    """[S] sums of a value by token over each segment."""
    return values_T.new_zeros(forest.start_S.numel()).index_add(0, forest.segment_T, values_T)


def as_conversation(prompt: Sequence[Message], answer: str) -> Conversation:
    return Conversation(messages=(*prompt, Message("assistant", answer)))
