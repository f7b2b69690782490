from __future__ import annotations

from html.parser import HTMLParser

from pipeline.data.records import Message
from pipeline.report.samples import (
    Answer,
    Exhibit,
    overview,
    samples_html,
    samples_markdown,
    visible,
    write_samples,
)

EXHIBITS = [
    Exhibit(
        "test-1",
        (Message("user", "Where does Mira live?"), Message("assistant", "Here."), Message("user", "Where?")),
        [
            Answer("sft", "No <b>idea</b> & more", True, 5, {"gold": 0.4, "proxy": -1.0}, {"correct": 0.0}),
            Answer("dpo", "Mira lives in Dovan.", False, 6, {"gold": 1.0, "proxy": 2.0}, {"correct": 1.0}),
        ],
    ),
    Exhibit("test-2", (Message("user", "Hi"),), [Answer("sft", "Hello.", scores={"gold": 1.0}), Answer("dpo", "")]),
]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "action")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_every_answer_beside_its_policy():
    page = Page(samples_html(EXHIBITS, "evaluate", {"temperature": "0.7"}))
    assert page.open == [] and page.tags.count("article") == 4 and page.tags.count("section") == 2
    for text in ("Where does Mira live?", "No <b>idea</b> & more", "gold 1.00 · proxy 2.00 · 6 tokens"):
        assert text in page.text
    for text in (
        "✓ correct",
        "✗ correct",
        "did not stop by itself",
        "(empty)",
        "2 prompts and means over them · temperature 0.7",
    ):
        assert text in page.text
    assert page.text.count("dpo best") == page.text.count(" best") == 1  # not where only one answer was judged


def test_the_page_needs_neither_network_nor_scripts():
    text = samples_html(EXHIBITS, "evaluate", {})
    page = Page(text)
    assert page.addresses == [] and "script" not in page.tags and "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text


def test_an_answer_cannot_break_out():
    evil = '</article><script>alert(1)</script>" onload="x\x1b[2J\u202e'
    exhibit = Exhibit(evil, (Message("user", evil),), [Answer(evil, evil, parts={evil: 0.5}, scores={evil: 1.0})])
    page = Page(samples_html([exhibit], evil, {evil: evil}))
    assert "script" not in page.tags and page.tags.count("article") == 1
    assert "\x1b" not in page.text and "\u202e" not in page.text


def test_markdown_fences_what_the_model_wrote():
    nested = [Exhibit("x", (Message("user", "Code?"),), [Answer("sft", "```python\n1\n```\n# not a heading")])]
    text = samples_markdown(nested, "evaluate", {})
    assert "````text\n```python\n1\n```\n# not a heading\n````" in text
    shown = samples_markdown(EXHIBITS, "evaluate", {"temperature": "1.0"})
    assert "### dpo\n\n```text\nMira lives in Dovan.\n```\n\ngold 1.00 · proxy 2.00 · 6 tokens · correct 1.00" in shown


def test_control_characters_become_visible():
    assert visible("a\x00b\tc\n\u202e") == "a<U+0000>b\tc\n<U+202E>"
    assert visible("naïve 中文 👩‍🔬") == "naïve 中文 👩‍🔬"
    assert visible("\ud800") == "<U+D800>"


def test_overview_averages_what_is_there():
    grid = overview(EXHIBITS)
    assert grid.head == ["policy", "gold", "proxy", "correct", "stopped"]
    assert grid.rows == [["sft", "0.70", "-1.00", "0.00", "1.00"], ["dpo", "1.00", "2.00", "1.00", "0.50"]]


def test_messages_of_parts_and_calls():
    messages = (
        Message("user", ({"type": "text", "text": "Look"}, {"type": "image"})),
        Message("assistant", None, tool_calls=({"function": {"name": "look_up"}},)),
    )
    text = samples_markdown([Exhibit("x", messages, [])], "t", {})
    assert "Look" in text and "calls look_up" in text


def test_both_files_are_written(tmp_path):
    paths = write_samples(tmp_path, EXHIBITS, title="evaluate")
    assert [p.name for p in paths] == ["samples.md", "samples.html"] and all(p.stat().st_size for p in paths)
