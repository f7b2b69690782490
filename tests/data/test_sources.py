"""Every format, by example; conversions; the real files with the quirks that their README names."""

from __future__ import annotations

import json
import os
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.data.records import (
    Comparison,
    Completion,
    Conversation,
    Document,
    Message,
    Prompt,
    Rated,
    Sample,
)
from pipeline.data.sources import (
    KINDS,
    describe,
    place,
    read,
    read_comparisons,
    read_conversations,
    read_documents,
    read_prompts,
    read_rated,
    survey,
    tell,
    to_json,
    write_jsonl,
)
from pipeline.flow.errors import UserError

U, A, S = (lambda t, r=r: Message(r, t) for r in ("user", "assistant", "system"))
UD, AD = (lambda t, r=r: {"role": r, "content": t} for r in ("user", "assistant"))
TURNS = [UD("q"), AD("a")]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path: Path):
    return lambda *rows: write(tmp_path / "rows.jsonl", *rows)


PAIR = ((Completion("good", 0), Completion("bad", 1)), "good", "bad")
CONVERSATIONS = [
    ("messages", {"messages": TURNS}, (U("q"), A("a"))),
    ("sharegpt",
     {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
     (S("s"), U("q"), A("a"))),
    ("alpaca", {"instruction": "q", "input": "x", "output": "a"}, (U("q\n\nx"), A("a"))),
    ("alpaca", {"instruction": "q", "input": "", "output": "a", "history": [["h", "i"]]},
     (U("h"), A("i"), U("q"), A("a"))),
    ("question-answer", {"question": "q", "answer": "a"}, (U("q"), A("a"))),
    ("prompt-completion", {"prompt": "q", "completion": "a"}, (U("q"), A("a"))),
    ("prompt-completion", {"prompt": [UD("q")], "completion": [AD("a")]}, (U("q"), A("a"))),
    ("hh", {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
     (U("q"), A("a"))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "messages"), CONVERSATIONS)
def test_conversations(file: Any, name: str, row: Any, messages: Any) -> None:
    found = read_conversations(file(row))
    assert found.format == name
    assert found[0] == Conversation(messages, source="rows.jsonl:1")


EQUAL = {"chosen": "Human: q\n\nAssistant: good  one", "rejected": "Human: q\n\nAssistant: bad"}
COMPARISONS = [
    ("comparisons",
     {"prompt": [UD("q")], "completions": [{"text": "good", "rank": 0}, {"text": "bad", "rank": 1}]}),
    ("ranked-lists", {"prompt": "q", "responses": ["good", "bad"], "ranks": [0, 1]}),
    ("trl-explicit", {"prompt": "q", "chosen": "good", "rejected": "bad"}),
    ("trl-explicit", {"prompt": [UD("q")], "chosen": [AD("good")], "rejected": [AD("bad")]}),
    ("trl-explicit", {"prompt": "q", "chosen": [UD("q"), AD("good")], "rejected": [UD("q"), AD("bad")]}),
    ("trl-implicit", {"chosen": [UD("q"), AD("good")], "rejected": [UD("q"), AD("bad")]}),
    ("message-pairs", {"chosen_messages": [UD("q"), AD("good")], "rejected_messages": [UD("q"), AD("bad")]}),
    ("hh", {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad "}),
    ("sharegpt-pairs", {"conversations": [{"from": "human", "value": "q"}],
                        "chosen": {"from": "gpt", "value": "good"},
                        "rejected": {"from": "gpt", "value": "bad"}}),
    ("alpaca-ranked", {"instruction": "q", "input": "", "output": ["good", "bad"]}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row"), COMPARISONS)
def test_comparisons(file: Any, name: str, row: Any) -> None:
    found = read_comparisons(file(row))
    assert found.format == name
    expected = Comparison((U("q"),), (Completion("good", 0), Completion("bad", 1)), source="rows.jsonl:1")
    assert found[0] == expected
    assert read_prompts(file(row))[0].messages == (U("q"),)
    assert read_conversations(file(row))[0].messages == (U("q"), A("good"))


def test_scores_and_ties(file: Any) -> None:
    scored = {"prompt": "q", "completions": ["x", "y", "z"], "scores": [1, 2.5, 1]}
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 8.5, "score_rejected": 8.5}
    first = read_comparisons(file(scored))
    assert first.format == "ranked-lists" and first[0].pairs() == [(1, 0), (1, 2)] and first.counts["ties"] == 1
    second = read_comparisons(file(pair))
    assert second[0].pairs() == [] and second.counts["ties"] == 1


def test_trees_and_annotators(file: Any) -> None:
    reply = lambda t, rank, *more: {"role": "assistant", "text": t, "rank": rank, "replies": list(more)}
    ask = {"role": "prompter", "text": "q2", "rank": None, "replies": [reply("c", 1), reply("d", 0)]}
    tree = {"message_tree_id": "t", "prompt": {"role": "prompter", "text": "q", "replies": [
        reply("a", 0, ask), reply("b", 1), reply("u", None)]}}  # fmt: skip
    found = read_comparisons(file(tree))
    assert [c.prompt for c in found] == [(U("q"),), (U("q"), A("a"), U("q2"))]
    assert [[c.completions[i].text for i, _ in c.pairs()] for c in found] == [["a"], ["d"]]
    verdicts = {"instruction": "q", "input": "", "response1": "x", "response2": "y"}
    found = read_comparisons(file({**verdicts, "annotator1": 2, "annotator2": 0}))
    assert [(c.annotator, c.pairs()) for c in found] == [("annotator1", [(1, 0)]), ("annotator2", [])]


BAD_PAIRS = [
    ("identical chosen and rejected", {"prompt": "q", "chosen": "a", "rejected": "a"}),
    ("identical chosen and rejected", {"prompt": "q", "responses": ["a", "b", "a"], "ranks": [0, 1, 2]}),
    ("prompts differ", {"chosen": [UD("q"), AD("a")], "rejected": [UD("r"), AD("b")]}),
    ("prompts differ", {"prompt": "z", "chosen": [UD("q"), AD("a")], "rejected": [UD("q"), AD("b")]}),
    ("score is not a number",
     {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": "8", "score_rejected": 1}),
    ("score is not a number", {"prompt": "q", "responses": ["a", "b"], "scores": [True, 1]}),
    ("score is not a number", {"prompt": "q", "responses": ["a", "b"], "scores": [10**400, 1]}),
    ("rank is too large", {"prompt": "q", "responses": ["a", "b"], "ranks": [0, 10**400]}),
    ("rank is too large", {"prompt": "q", "responses": ["a", "b"], "ranks": [2**53 + 1, 0]}),
    ("reply is not an object",
     {"message_tree_id": "t", "prompt": {"role": "prompter", "text": "q", "replies": [None]}}),
    ("replies has the wrong type",
     {"message_tree_id": "t", "prompt": {"role": "prompter", "text": "q", "replies": 5}}),
    ("scores contradict the choice",
     {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2}),
    ("score is missing", {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1}),
    ("prompt ends with an assistant turn", {"prompt": TURNS, "chosen": "a", "rejected": "b"}),
    ("empty assistant", {"prompt": "q", "chosen": "", "rejected": "b"}),
    ("fewer than two completions", {"prompt": "q", "responses": ["a"], "ranks": [0]}),
    ("completions without rank or score",
     {"prompt": "q", "completions": [{"text": "a", "rank": 0}, {"text": "b"}]}),
    ("completions without rank or score",
     {"prompt": "q", "completions": [{"text": "a", "rank": 0}, {"text": "b", "score": 1}]}),
    ("lists of unequal length", {"prompt": "q", "responses": ["a", "b"], "ranks": [0]}),
    ("chosen has the wrong type", {"prompt": "q", "chosen": True, "rejected": "b"}),
    ("no answer at the end", {"chosen": [UD("q")], "rejected": [UD("q"), AD("b")]}),
    ("no prompt", {"chosen": "abc", "rejected": "xyz"}),
    ("same role twice in a row", {"chosen": "\n\nHuman: q\n\nHuman: r\n\nAssistant: a",
                                  "rejected": "\n\nHuman: q\n\nHuman: r\n\nAssistant: b"}),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "row"), BAD_PAIRS)
def test_bad_pairs_are_named(file: Any, reason: str, row: Any) -> None:
    with pytest.raises(UserError) as caught:
        read_comparisons(file(row))
    assert f"rows.jsonl:1: {reason}" in str(caught.value)


def test_implied_prompts_are_those_of_trl() -> None:
    from trl.data_utils import extract_prompt, is_conversational

    from pipeline.data.formats import FORMATS

    convert = next(f.convert for f in FORMATS if f.name == "trl-implicit")
    rows: list[dict[str, Any]] = [
        {"chosen": [UD("q"), AD("a")], "rejected": [UD("q"), AD("b")]},
        {"chosen": [UD("q"), AD("x"), UD("r"), AD("a")], "rejected": [UD("q"), AD("x"), UD("r"), AD("b")]},
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    ]
    for row in rows:
        theirs = extract_prompt(dict(row))
        (ours,) = convert(row, "x:1")
        assert isinstance(ours, Comparison)
        if is_conversational(row):
            assert [to_json(m) for m in ours.prompt] == theirs["prompt"]
            assert ours.completions[0].text == theirs["chosen"][0]["content"]
        else:
            assert ours.prompt == (U(theirs["prompt"]),)
            assert [c.text for c in ours.completions] == [theirs["chosen"], theirs["rejected"]]


def test_rated_prompts_and_documents(file: Any) -> None:
    own = {"prompt": [UD("q")], "completion": "a", "desirable": False}
    assert read_rated(file(own))[0] == Rated((U("q"),), "a", False, "rows.jsonl:1")
    assert read_rated(file({"messages": TURNS, "label": True}))[0].desirable is True
    assert read_rated(file({"prompt": "q", "completion": "a", "label": True}))[0].prompt == (U("q"),)
    assert read_prompts(file({"id": "p1", "messages": [UD("q")]}))[0] == Prompt("p1", (U("q"),), "rows.jsonl:1")
    assert read_prompts(file({"prompt": "q"}))[0] == Prompt("rows.jsonl:1", (U("q"),), "rows.jsonl:1")
    assert read_documents(file({"text": "t"}, {"text": "u", "source": "s"}))[1] == Document("u", source="s")
    dialogue = read_documents(file({"messages": TURNS}))
    assert dialogue[0] == Document(messages=(U("q"), A("a")), source="rows.jsonl:1")


def test_reference_answers_of_prompts(file: Any, tmp_path: Path) -> None:
    """Text stays text, a number becomes its text; both come back from what is written, alone and inside a sample."""
    asked = [{"prompt": [UD("q")]} | given for given in ({}, {"answer": " 4 "}, {"answer": 4}, {"answer": 0.5})]
    found = read_prompts(file(*({"id": str(i), "messages": a.pop("prompt")} | a for i, a in enumerate(asked))))
    assert [p.answer for p in found] == [None, " 4 ", "4", "0.5"]
    write_jsonl(tmp_path / "again.jsonl", found)
    assert read_prompts(tmp_path / "again.jsonl").records == found.records
    assert "answer" not in to_json(found[0]) and to_json(found[2])["answer"] == "4"
    sample = Sample(found[1], 0, "x", (1,), (-0.5,), True, {"proxy": 1.0})
    write_jsonl(tmp_path / "samples.jsonl", [sample])
    assert read(tmp_path / "samples.jsonl", "samples").records == [sample]
    for wrong in (True, ["4"], {"value": 4}):
        with pytest.raises(UserError, match="answer has the wrong type: answer is .*, expected a string or a number"):
            read_prompts(file({"id": "p", "messages": [UD("q")], "answer": wrong}))


def test_questions_with_answers_are_prompts_where_prompts_are_wanted(file: Any) -> None:
    """As GSM8K's files are; wanted as conversations they stay demonstrations."""
    rows = [{"question": "2 + 2?", "answer": "It is 4.\n#### 4"}, {"question": "1 + 1?", "answer": 2}]
    found = read_prompts(file(*rows))
    assert found.format == "questions"
    assert [(p.messages, p.answer) for p in found] == [((U("2 + 2?"),), rows[0]["answer"]), ((U("1 + 1?"),), "2")]
    assert read_conversations(file(rows[0]))[0].messages == (U("2 + 2?"), A(rows[0]["answer"]))
    with pytest.raises(UserError, match="answer has the wrong type"):
        read_prompts(file({"question": "q", "answer": None}))


@pytest.mark.parametrize("wanted", [read_conversations, read_documents])
@pytest.mark.parametrize("row", [{"messages": TURNS}, {"prompt": "q", "completion": "a"}])
@pytest.mark.parametrize("verdict", [{"label": False}, {"desirable": True}])
def test_unpaired_answers_are_never_taken_for_demonstrations(file: Any, wanted: Any, row: Any, verdict: Any) -> None:
    with pytest.raises(UserError, match="this file holds rated, but .* are wanted"):
        wanted(file(row | verdict))


def test_prompts_that_end_with_an_answer_or_share_an_id(file: Any) -> None:
    with pytest.raises(UserError, match="rows.jsonl:1: prompt ends with an assistant turn"):
        read_prompts(file({"id": "a", "messages": TURNS}), format="prompts")
    with pytest.raises(UserError, match="rows.jsonl:2: id used twice"):
        read_prompts(file(*[{"id": "a", "messages": [UD("q")]}] * 2))


def test_own_records_survive_writing_and_reading(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": [1, None]}}}
    prompt = Prompt("p1", (U("q"),), "s")
    records: dict[str, list[Any]] = {
        "documents": [Document("t\u2028 🙂", source="s"), Document(messages=(U("q"), A("a")), source="s")],
        "conversations": [
            Conversation(
                (
                    S("s"),
                    U("q"),
                    Message("assistant", None, (call,)),
                    Message("tool", "r", name="f"),
                    Message("assistant", "a", weight=0.0),
                ),
                ({"name": "f"},),
                "s",
            )
        ],  # fmt: skip
        "comparisons": [
            Comparison((U("q"),), (Completion("a", 0), Completion("b", 0), Completion("c", 2)), "me", "s"),
            Comparison((U("q"),), (Completion("a", score=0.0), Completion("b", score=-1.5)), None, "s"),
        ],
        "rated": [Rated((U("q"),), "a", False, "s")],
        "prompts": [prompt],
        "samples": [Sample(prompt, 0, "a", (9, 7), (-0.5, -0.25), True, {"proxy": 1.5})],
    }
    assert set(records) == set(KINDS)
    for kind, written in records.items():
        for i, record in enumerate(written):
            path = tmp_path / f"{kind}{i}.jsonl"
            assert write_jsonl(path, [record]) == 1
            assert read(path, kind).records == [record]
    assert to_json(prompt) == {"id": "p1", "messages": [UD("q")], "source": "s"}


def test_sources_of_all_shapes(tmp_path: Path) -> None:
    one, two = (write(tmp_path / f"{n}.jsonl", {"messages": TURNS}) for n in "ab")
    write(tmp_path / "c.jsonl", CONVERSATIONS[1][1])
    assert [c.source for c in read_conversations([one, str(two)])] == ["a.jsonl:1", "b.jsonl:1"]
    assert read_conversations(tmp_path).format == "messages+sharegpt"
    artifact = SimpleNamespace(data_files=[one], format="openai", path=tmp_path)
    assert read_conversations(artifact).format == "messages"
    with pytest.raises(UserError, match="no such file"):
        read_conversations(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="not a regular file"):
        read_conversations("/dev/null")
    with pytest.raises(UserError, match="'sharegtp' is not known for conversations: one of .*sharegpt"):
        read_conversations(one, format="sharegtp")
    (tmp_path / "t.txt").write_text("text")
    with pytest.raises(UserError, match="a plain text file holds documents"):
        read_comparisons(tmp_path / "t.txt")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=r"empty.jsonl: no usable conversations \(empty: it holds no row\)$"):
        read_conversations(tmp_path / "empty.jsonl")
    tree = {"message_tree_id": "t", "prompt": {"role": "prompter", "text": "q"}}
    with pytest.raises(UserError, match=r"no usable comparisons \(none of its 2 rows gives a record\)$"):
        read_comparisons(write(tmp_path / "unranked.jsonl", tree, tree))


@pytest.mark.parametrize("kind", ["pipe", "device", "link", "folder"])
def test_what_stands_in_a_folder_of_data_is_inside_and_regular(tmp_path: Path, kind: str) -> None:
    folder, odd = tmp_path / "data", tmp_path / "data" / "x.jsonl"
    folder.mkdir()
    outside = write(tmp_path / "outside.jsonl", {"messages": TURNS})
    make = {"pipe": lambda: os.mkfifo(odd), "folder": odd.mkdir, "device": lambda: odd.symlink_to("/dev/zero")}
    make.get(kind, lambda: odd.symlink_to(outside))()
    with pytest.raises(UserError, match=r"data/x.jsonl: not a regular file|'x.jsonl' leaves its directory"):
        read_conversations(folder)
    assert len(read_conversations(outside)) == 1  # what the user names may lie anywhere
    odd.rmdir() if kind == "folder" else odd.unlink()
    (tmp_path / "mine.jsonl").symlink_to(outside)
    assert len(read_conversations(tmp_path / "mine.jsonl")) == 1


def test_paths_in_records_are_text_and_not_opened(file: Any, tmp_path: Path) -> None:
    """A pipe would be waited for."""
    os.mkfifo(tmp_path / "pipe")
    for named in (str(tmp_path / "pipe"), "../../../etc/passwd", "file:///dev/zero"):
        assert read_documents(file({"text": named, "path": named, "source": named}))[0].text == named
        (pair,) = read_comparisons(file({"prompt": named, "chosen": named, "rejected": "b", "images": [named]}))
        assert pair.completions[0].text == named
        for part in ({"type": "image", "path": named}, {"type": "image_url", "image_url": {"url": named}}):
            with pytest.raises(UserError, match="unsupported part"):
                read_conversations(file({"messages": [{"role": "user", "content": [part]}, TURNS[-1]]}))


def test_rows_with_the_same_unknown_keys_are_told_once(tmp_path: Path) -> None:
    path, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    write(path, *[{"a": 1, "b": 2}] * 3, {"c": 1}, {"b": 1, "a": 2})
    write(other, {"c": 1})
    found = survey([path, other], None)
    assert [(Path(p.file).name, p.line) for p in found.bad] == [
        *(("rows.jsonl", i) for i in range(1, 6)),
        ("other.jsonl", 1),
    ]
    assert tell(found.bad) == [
        f"{path}:1: unknown format: no known format has the keys a, b (rows below alike: 3)",
        f"{path}:4: unknown format: no known format has the keys c",
        f"{other}:1: unknown format: no known format has the keys c",
    ]
    assert describe(found).splitlines()[:3] == tell(found.bad)
    assert describe(found).splitlines()[3].startswith("6 of 6 rows cannot be used (6 unknown format)")


def test_hub_ids_go_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return datasets.Dataset.from_list([{"prompt": "q", "chosen": "a", "rejected": "b", "at": date(2024, 5, 1)}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_comparisons("hub:trl-lib/pairs:small@test")
    assert asked == [(("trl-lib/pairs", "small"), {"split": "test"})]
    assert (found.format, found[0].source) == ("trl-explicit", "trl-lib/pairs:small@test:1")


def test_speed(file: Any) -> None:
    path = file(*[{"id": i, "messages": [UD(f"question {i}"), AD("an answer " * 10)]} for i in range(20_000)])
    start = time.perf_counter()
    assert len(read_conversations(path)) == 20_000
    assert time.perf_counter() - start < 5  # about 0.4 s on an idle core


# Real files: numbers from the README beside them


def test_hh_harmless(shared_data: Path) -> None:
    pairs = read_comparisons(shared_data / "pref_hh_harmless_base" / "harmless_base.dev.jsonl.gz", skip_bad=True)
    assert pairs.format == "hh" and pairs.counts["rows"] == 1857
    lines = {r: [p.line - 1 for p in pairs.bad if p.reason == r] for r in pairs.reasons}
    assert lines == {
        "empty assistant": [70, 417, 741, 885],
        "prompts differ": [1005, 1566, 1568, 1641],
        "same role twice in a row": [
            531,
            611,
            1060,
            1481,
        ],  # of 8: in the other 4 the contexts differ as well
    }
    assert len(pairs) == 1845
    assert all(len(c.prompt) % 2 for c in pairs)  # every prompt ends with a human turn
    assert any("  " in c.completions[0].text for c in pairs)  # double spaces inside are text
    assert all(m.content == m.content.strip() for c in pairs for m in c.prompt)


def test_oasst_rankings(shared_data: Path) -> None:
    ranked = read_comparisons(shared_data / "pref_oasst_zh_rm" / "oasst_rm_zh.dev.jsonl", skip_bad=True)
    assert ranked.counts["rows"] == 631 and ranked.reasons == {"identical chosen and rejected": 4}
    assert {len(c.completions) for c in ranked} <= set(range(2, 11))
    assert {len(c.prompt) for c in ranked} == {1, 3, 5}
    trees = read_comparisons(shared_data / "pref_oasst_en_trees" / "en_100_tree.jsonl")
    assert trees.counts["rows"] == 100 and sum(len(c.pairs()) for c in trees) == 754


def test_pandalm(shared_data: Path) -> None:
    verdicts = read_comparisons(shared_data / "pref_pandalm_human" / "pandalm_testset_v1.dev.jsonl", skip_bad=True)
    wrong = sum(n for reason, n in verdicts.reasons.items() if "wrong type" in reason)
    assert (verdicts.counts["rows"], wrong) == (616, 6)
    assert verdicts.reasons["empty assistant"] == 31
    assert len(verdicts) == 3 * (616 - 37) and verdicts.counts["ties"] > 0


def test_llamafactory_pairs(shared_data: Path) -> None:
    folder = shared_data / "pref_llamafactory_demo"
    english, chinese = (read_comparisons(folder / f"dpo_{x}_demo.json") for x in ("en", "zh"))
    assert (len(english), english.counts["duplicates"]) == (300, 5)
    assert (len(chinese), chinese.counts["duplicates"]) == (300, 11)
    assert any(c.prompt[0].role == "system" for c in english)
    assert len(read_rated(folder / "kto_en_demo.json")) == 300
    assert read_comparisons(folder / "v1_dpo_demo.jsonl").format == "message-pairs"
    slice_ = shared_data / "pref_firefly_ultrafeedback_slice" / "ultrafeedback_binarized_slice.jsonl"
    assert read_comparisons(slice_).counts["ties"] == 4


def test_conversations_of_the_wild(shared_data: Path) -> None:
    demo = shared_data / "sft_llamafactory_demo"
    expected = {
        shared_data / "sft_fastchat_dummy" / "dummy_conversation.dev.jsonl": ("sharegpt", 400),
        shared_data / "sft_oasst_zh" / "oasst_sft_zh.dev.jsonl": ("alpaca", 558),
        shared_data / "sft_gsm8k" / "gsm8k_train.jsonl.gz": ("question-answer", 7473),
        demo / "glaive_toolcall_en_demo.json": ("sharegpt", 300),
        demo / "glaive_toolcall_zh_demo.json": ("sharegpt", 300),
        demo / "identity.json": ("alpaca", 91),
        demo / "v1_sft_demo.jsonl": ("messages", 500),
        demo / "reason_tool_use_demo_50.jsonl": ("messages", 50),
    }
    for path, (name, rows) in expected.items():
        found = read_conversations(path)
        assert (found.format, len(found)) == (name, rows), path.name
    assert read_conversations(demo / "glaive_toolcall_zh_demo.json").counts["duplicates"] == 43
    answers = [c.messages[-1].content for c in read_conversations(demo / "identity.json")]
    assert any("{{name}}" in a for a in answers)


def test_the_wild_renders_and_masks(shared_data: Path) -> None:
    """T5 on real turns: tool calls, reasoning, Chinese; the stored template gives the same ids."""
    from pipeline.data.chat import ChatFormat
    from pipeline.data.template import as_dict, message_text
    from pipeline.llama.tokenizer import train_tokenizer

    demo = shared_data / "sft_llamafactory_demo"
    found = [
        c
        for name in (
            "glaive_toolcall_en_demo.json",
            "glaive_toolcall_zh_demo.json",
            "reason_tool_use_demo_50.jsonl",
        )
        for c in read_conversations(demo / name).records[:25]
    ]
    chat = ChatFormat(train_tokenizer([message_text(m) for c in found for m in c.messages], 1000))
    for conversation, rendered in zip(found, chat.render_all(found), strict=True):
        trained = [i for i, m in zip(rendered.ids, rendered.mask, strict=True) if m]
        answers = [message_text(m) for m in conversation.messages if m.role == "assistant"]
        assert chat.tokenizer.decode(trained) == "".join(a + "<|end|>" for a in answers)
        theirs = chat.tokenizer.apply_chat_template(
            [as_dict(m) for m in conversation.messages],
            tools=list(conversation.tools) or None,
            return_dict=True,
        )
        assert theirs["input_ids"] == rendered.ids


def test_plain_text_of_the_wild(shared_data: Path) -> None:
    plays = read_documents(shared_data / "pt_tinyshakespeare" / "tinyshakespeare.txt")
    text = (shared_data / "pt_tinyshakespeare" / "tinyshakespeare.txt").read_text()
    assert "\n\n".join(d.text or "" for d in plays).split() == text.split()
    assert len(read_documents(shared_data / "pt_tinystories" / "tinystories.dev.jsonl")) == 947
    novel = read_documents(shared_data / "pt_zh_classics" / "xiyouji.txt.gz")
    assert all("\r" not in (d.text or "") for d in novel)
    assert any("<unk>" in (d.text or "") for d in read_documents(shared_data / "pt_wikitext2" / "wikitext2_valid.txt"))


def test_survey_reports_without_raising(file: Any) -> None:
    found = survey(file({"messages": []}), None)
    assert (len(found), found.counts["bad"]) == (0, 1)


# What is shipped

DATA = Path(__file__).resolve().parents[2] / "data"


@pytest.mark.parametrize("kind", KINDS)
def test_shipped_samples(kind: str) -> None:
    found = read(DATA / "samples" / f"{kind}.jsonl", kind)
    assert found.counts["duplicates"] == 0
    assert len(found) >= {"rated": 12, "samples": 4}.get(kind, 20)


def test_every_line_of_the_readme_reads_as_its_kind(tmp_path: Path) -> None:
    kind, seen = "", []
    for line in (DATA / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("**") and "(`" in line:
            kind = line.split("(`")[1].split("`")[0]
        if line.startswith("    {"):
            path = tmp_path / "line.jsonl"
            path.write_text(line.strip() + "\n", encoding="utf-8")
            assert len(read(path, kind)) == 1
            seen.append(kind)
    assert set(seen) == set(KINDS)


def test_parts_of_a_file_share_no_prompt_and_lose_no_record(tmp_path: Path) -> None:
    pairs = [
        {"prompt": [UD(f"q{i % 40}")], "completions": [{"text": f"a{i}", "rank": 0}, {"text": "b", "rank": 1}]}
        for i in range(80)
    ]
    path = write(tmp_path / "pairs.jsonl", *pairs)

    def part(low: float, high: float):
        return read_comparisons(SimpleNamespace(data_files=[path], format=None, path=tmp_path, part=(low, high)))

    whole, low, high = read_comparisons(path), part(0.0, 0.5), part(0.5, 1.0)
    assert sorted([*low.records, *high.records], key=lambda c: c.source) == sorted(whole, key=lambda c: c.source)
    asked = [{c.prompt[0].content for c in p} for p in (low, high)]
    assert asked[0].isdisjoint(asked[1]) and 10 <= len(asked[0]) <= 30
    assert (low.counts["records"], low.counts["outside the part"]) == (len(low), 80 - len(low))
    assert part(0.0, 1.0).records == whole.records
    with pytest.raises(UserError, match=r"no usable comparisons \(80 lie outside the part"):
        part(0.0, 1e-9)


def test_a_record_is_placed_by_the_users_first_turn() -> None:
    """Whatever stands before or after it, so that all records of one prompt fall into one part."""
    ask = Message("user", "Where?")
    rest = (Message("assistant", "Here."), Message("user", "Why?"))
    system = Message("system", "Be brief.")
    records = [
        Prompt("p", (ask,)),
        Prompt("p", (system, ask, *rest)),
        Conversation((ask, *rest[:1])),
        Comparison((ask,), (Completion("a", rank=0), Completion("b", rank=1))),
        Document(messages=(ask,)),
        Document("Where?"),
    ]
    assert {place(r) for r in records} == {place(records[0])}
    assert 0 <= place(records[0]) < 1 and place(Document("Who?")) != place(records[0])


def test_a_file_of_another_kind_is_named_for_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    turn = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    write(path, turn, turn)
    with pytest.raises(UserError) as caught:
        read_comparisons(path)
    said = str(caught.value).splitlines()
    assert said[0] == (
        f"{path}:1: another kind: this file holds conversations (sharegpt), but comparisons are wanted "
        "(rows below alike: 1)"
    )
    assert "--skip-bad" in said[1]
    with pytest.raises(UserError) as caught:
        read_comparisons(path, skip_bad=True)
    assert "--skip-bad" not in str(caught.value)
