"""Records to segments: weights, what is lost and counted, what stays together."""

from __future__ import annotations

import pytest
import torch

from pipeline.data.chat import NothingToTrain
from pipeline.data.forest import build, size
from pipeline.data.groups import (
    answer_sums,
    answers,
    as_conversation,
    comparison_groups,
    continuations,
    conversation_groups,
    document_groups,
    only,
    rated_groups,
    sum_by_segment,
    unrelated_answers,
)
from pipeline.data.records import Comparison, Completion, Conversation, Document, Message, Rated
from pipeline.flow.errors import UserError
from tests.small import ask, chat, comparison


def test_documents_are_cut_into_windows_that_predict_all_but_their_first_token():
    encoded = document_groups([Document("abcdefgh"), Document("x")], chat(), 4)  # bos, 8 characters, eos; bos, x, eos
    assert [len(g[0].ids) for g in encoded.groups] == [4, 4, 2, 3]
    assert [list(g[0].weights) for g in encoded.groups] == [[0, 1, 1, 1], [0, 1, 1, 1], [0, 1], [0, 1, 1]]
    assert (encoded.kept, encoded.shortened, encoded.dropped) == ([0, 0, 0, 1], 1, 0)
    joined = [i for g in encoded.groups[:3] for i in g[0].ids]
    assert joined == chat().document_ids(Document("abcdefgh"))


def test_a_window_of_one_token_predicts_nothing_and_is_left_out():
    encoded = document_groups([Document("abcdefgh")], chat(), 3)
    assert [len(g[0].ids) for g in encoded.groups] == [3, 3, 3]


def turns(*texts: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[i % 2], t) for i, t in enumerate(texts)), source="f.jsonl:7")


def test_conversations_keep_mask_and_rounds_and_lose_whole_rounds():
    short, long = turns("ab", "c"), turns("aaaa", "bbbb", "cc", "dd")
    encoded = conversation_groups([short, long, turns("a" * 50, "b")], chat(), 12, "all_rounds")
    assert (encoded.kept, encoded.shortened, encoded.dropped) == ([0, 1], 1, 1)
    (segment,) = encoded.groups[0]  # bos user a b end assistant c end
    assert list(segment.weights) == [0, 0, 0, 0, 0, 0, 1, 1]
    assert list(segment.tokens["round"]) == [-1, 0, 0, 0, 0, 0, 0, 0]
    (segment,) = encoded.groups[1]  # the first round is gone: bos user c c end assistant d d end
    assert list(segment.weights) == [0] * 6 + [1] * 3
    assert list(segment.tokens["round"]) == [-1] + [1] * 8


def test_which_rounds_train():
    whole = turns("a", "bb", "c", "dd")
    counts = {}
    for train_on in ("all_rounds", "last_round"):
        (group,) = conversation_groups([whole], chat(), 99, train_on).groups
        counts[train_on] = sum(group[0].weights)
    assert counts == {"all_rounds": 6, "last_round": 3}
    with pytest.raises(NothingToTrain, match=r"f\.jsonl:7"):
        conversation_groups([turns("only a question")], chat(), 99, "all_rounds")


def test_a_comparison_holds_its_prompt_once():
    encoded = comparison_groups([comparison("hi", "yes", "no", "what")], chat(), 99)
    ((prompt, *rest),) = encoded.groups
    assert list(prompt.ids) == chat().prompt_ids(ask("hi")) and prompt.weights is None
    assert [list(s.ids) for s in rest] == [chat().completion_ids(t) for t in ("yes", "no", "what")]
    assert [s.parent for s in rest] == [0, 0, 0]
    assert [list(s.weights) for s in rest] == [[1.0] * len(s.ids) for s in rest]
    assert [s.facts["worth"] for s in rest] == [2, 1, 0]
    assert size(encoded.groups[0]) == (2 + 4) + (3 + 1) + (2 + 1) + (4 + 1)


def test_scores_too_close_for_float32_stay_apart_and_ties_stay_ties():
    close = comparison("q", "a", "b", "c", scores=[1.0, 1.0 + 1e-12, 1.0])
    (group,) = comparison_groups([close], chat(), 99).groups
    assert build([group]).facts["worth"].tolist() == [0.0, 0.0, 1.0, 0.0]


def test_an_answer_is_never_cut():
    pairs = [comparison("q", "a", "b" * 20), comparison("q", "a", "b")]
    longest = len(chat().prompt_ids(ask("q"))) + 21
    assert comparison_groups(pairs, chat(), longest).dropped == 0
    encoded = comparison_groups(pairs, chat(), longest - 1)
    assert (encoded.dropped, encoded.kept) == (1, [1])


def test_pairs_find_each_other_by_group():
    """T15: groups in any order hold the same answers with the same worth."""
    pairs = [comparison(f"question {i}", f"good {i}", f"bad {i}") for i in range(5)]
    order = [3, 0, 4, 2, 1]
    forward = comparison_groups(pairs, chat(), 99)
    permuted = comparison_groups([pairs[i] for i in order], chat(), 99)
    assert permuted.groups == [forward.groups[i] for i in order]
    forest = build(permuted.groups)
    at = answers(forest)
    assert forest.group_S[at].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert forest.parent_S[at].tolist() == [0, 0, 3, 3, 6, 6, 9, 9, 12, 12]


def test_sums_by_segment_also_where_an_answer_is_empty():
    forest = build([continuations([5, 6], [[7], [], [8, 9]]), continuations([5], [[6]])])
    assert answers(forest).tolist() == [1, 2, 3, 5]
    assert sum_by_segment(torch.arange(1.0, 8.0), forest).tolist() == [3, 3, 0, 9, 6, 7]


def test_the_answer_ends_the_conversation():
    made = as_conversation(ask("q"), "a")
    assert [(m.role, m.content) for m in made.messages] == [("user", "q"), ("assistant", "a")]


def test_ranks_count_from_the_best():
    ranked = Comparison(ask("q"), (Completion("worst", rank=2), Completion("best", rank=0), Completion("tie", rank=2)))
    (group,) = comparison_groups([ranked], chat(), 99).groups
    assert [s.facts["worth"] for s in group[1:]] == [0, 1, 0]


def test_what_is_left_over_is_counted_and_nothing_left_is_said():
    tie, clear = comparison("a", "b", "c", scores=[1.0, 1.0]), comparison("a", "b", "c")
    encoded = comparison_groups([tie, clear], chat(), 99)
    assert (encoded.ties, encoded.dropped, encoded.kept) == (1, 0, [1])
    assert encoded.required("comparisons", 99) is encoded
    none = comparison_groups([tie, comparison("a" * 99, "b", "c")], chat(), 99)
    with pytest.raises(UserError, match=r"heldout: no record is left to use \(1 longer than max_tokens=99, 1 ties"):
        none.required("heldout", 99)


# Rated answers


def rated(prompt: str, text: str, desirable: bool = True) -> Rated:
    return Rated(ask(prompt), text, desirable)


def test_a_rated_answer_stands_beside_one_to_another_prompt():
    records = [rated("a", "yes"), rated("bb", "no", False), rated("c", "what")]
    encoded = rated_groups(records, chat(), 99)
    assert encoded.kept == [0, 1, 2] and (encoded.dropped, encoded.ties) == (0, 0)
    for group, record, other in zip(encoded.groups, records, ("no", "what", "yes"), strict=True):
        prompt, answer, unrelated = group
        assert list(prompt.ids) == chat().prompt_ids(record.prompt)
        assert list(answer.ids) == chat().completion_ids(record.completion)
        assert list(unrelated.ids) == chat().completion_ids(other)
        assert answer.parent == unrelated.parent == 0
        assert answer.facts == {"answer": 1, "desirable": record.desirable, "unrelated": 0}
        assert unrelated.facts == {"answer": 0, "desirable": 0, "unrelated": 1}
        assert only(group, "answer") == [prompt, answer] and only(group, "unrelated") == [prompt, unrelated]


def test_rated_answers_that_do_not_fit_are_dropped_and_unrelated_ones_cut():
    """A prompt of one character has 5 tokens: 5 + 4 + 1 = 10 fits, 5 + 6 does not; "longer" is cut beside bb to 4."""
    records = [rated("a", "long"), rated("b", "longer"), rated("bb", "no"), rated("a", "four")]
    encoded = rated_groups(records, chat(), 10)
    assert (encoded.kept, encoded.dropped) == ([0, 2, 3], 1)
    assert all(len(g[0].ids) + len(s.ids) <= 10 for g in encoded.groups for s in g[1:])
    assert [len(g[2].ids) for g in encoded.groups] == [3, 4, 3]  # "no", "long" or "four" without its end, "no"


def test_unrelated_answers_are_to_other_prompts():
    """The cyclic shift where prompts differ, a permutation where all have as many answers, and never the own prompt."""
    assert unrelated_answers([[1], [2], [3]]) == [1, 2, 0]
    pairs = unrelated_answers([[1], [1], [2], [2], [3], [3]])
    assert pairs == [2, 3, 4, 5, 0, 1]
    assert unrelated_answers([[1], [2], [1], [2]]) == [1, 0, 3, 2]
    for prompts in ([7, 7, 7, 7, 8], [1, 2, 2, 3, 3, 3, 4], [5, 6, 5, 6, 5, 9]):
        found = unrelated_answers([[p] for p in prompts])
        assert all(prompts[other] != p for other, p in zip(found, prompts, strict=True))
    assert unrelated_answers([]) == []
    with pytest.raises(UserError, match="all 2 rated answers are to one prompt"):
        unrelated_answers([[1], [1]])


def test_comparisons_are_split_into_their_best_and_their_worst():
    """Ranked 0, 1, 2: the middle says neither; a tie at the top makes two desirable ones; ties alone are counted."""
    records = [
        comparison("a", "best", "middle", "worst"),
        comparison("b", "x", "y", "z", scores=[1.0, 1.0, 0.0]),
        comparison("c", "x", "y", scores=[1.0, 1.0]),
        rated("d", "liked"),
    ]
    encoded = rated_groups(records, chat(), 99)
    assert (encoded.kept, encoded.ties) == ([0, 0, 1, 1, 1, 3], 1)
    texts = [chat().decode(list(g[1].ids)) for g in encoded.groups]
    assert texts == ["best", "worst", "x", "y", "z", "liked"]
    assert [g[1].facts["desirable"] for g in encoded.groups] == [1, 0, 1, 1, 0, 1]


def test_control_tokens_are_marked_where_asked_for_and_left_out_of_sums():
    """Answers "yes" and "no" with their end: 3 and 2 tokens of text; a control token spelled in text is text."""
    pair = comparison("q", "yes", "no", "<|end|>")
    (plain,) = comparison_groups([pair], chat(), 99).groups
    assert "control" not in plain[1].tokens
    (marked,) = comparison_groups([pair], chat(), 99, mark_control=True).groups
    assert [list(s.tokens["control"]) for s in marked[1:]] == [[0, 0, 0, 1], [0, 0, 1], [0] * 7 + [1]]
    for group, lengths in ((plain, [4, 3, 8]), (marked, [3, 2, 7])):
        forest = build([group])
        logprobs = torch.full((len(forest),), -2.0)
        if group is marked:
            logprobs[forest.tokens["control"] > 0] = torch.nan
        total, length = answer_sums(logprobs, forest)
        assert length[1:].tolist() == lengths and total[1:].tolist() == [-2.0 * n for n in lengths]
