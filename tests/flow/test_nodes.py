"""Several nodes: here two commands on one machine, each with its own fork server and half of the ranks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.flow import launch as launching
from pipeline.flow import nodes as nodes_module
from pipeline.flow.artifacts import sha256_file
from pipeline.flow.errors import RowFailed, UserError
from pipeline.flow.launch import LaunchSettings, Workers, free_port, launch_settings
from pipeline.flow.nodes import LINE_BYTES, Link, LinkGone, call, gather, introduction, log_of, node_of, orders
from pipeline.flow.runner import Interrupted

HERE = Path(__file__).parent
BOOT = """import sys, stages, toy_stages
stages.STAGES = toy_stages.TABLE
from pipeline.cli import main
main(sys.argv[1:])"""
PLAN = """
launch: {preload: false, threads: 1, device: cpu, strategy: ddp, processes: 2, nodes: 2, main_address: 127.0.0.1}
sources: {text: {kind: documents, path: text.txt}}
rows:
  - first: {documents: text}
  - second: {documents: first.documents}
stages: {first: {join: true}, second: {join: true}}
"""


def two_ports() -> int:
    """A free port with a free one above it."""
    while True:
        port = free_port()
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


class Nodes:
    """`rlhf run` on a plan of toy stages, as node 0 or node 1."""

    def __init__(self, root: Path) -> None:
        self.root, self.port = root, two_ports()
        (root / "text.txt").write_text("text ")
        (root / "plan.yaml").write_text(PLAN)

    def start(self, node: int | None, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        told = [
            f"launch.main_port={self.port}",
            *([f"launch.node_rank={node}"] if node is not None else []),
            *arguments,
        ]
        sets = [word for setting in told for word in ("--set", setting)]
        return subprocess.Popen(
            [sys.executable, "-c", BOOT, "run", "plan.yaml", *sets],
            cwd=self.root,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.root / "runs/plan/summary.json").read_text()))

    def wait_for(self, text: str, node: int = 0) -> None:
        log = self.root / "runs/plan/logs" / ("first.log" if node == 0 else f"first.node{node}.log")
        until = time.monotonic() + 60
        while not (log.exists() and text in log.read_text()):
            assert time.monotonic() < until, f"{log} never said {text!r}"
            time.sleep(0.02)


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    return Nodes(tmp_path)


def ended(process: subprocess.Popen[str], within: float = 60) -> tuple[int, str]:
    _, err = process.communicate(timeout=within)
    return process.returncode, err


def test_two_nodes_make_one_world(nodes: Nodes) -> None:
    """Ranks 0 and 1 sum 1 + 2; the second row finds the same nodes still there. NODE_RANK serves as well."""
    lead, follow = nodes.start(0), nodes.start(None, NODE_RANK="1")
    told = [ended(lead), ended(follow)]
    assert [code for code, _ in told] == [0, 0], told
    assert "waiting at 127.0.0.1" in told[0][1] and "node 1: first" in told[1][1] and "node 1: second" in told[1][1]
    rows = nodes.summary()["rows"]
    assert [row["status"] for row in rows] == ["executed", "executed"]
    text = Path(rows[-1]["artifacts"]["documents"]["path"]) / "data.jsonl"
    assert text.read_text() == "text word3\nword3\n"
    assert "toy log line" in (nodes.root / "runs/plan/logs/first.node1.log").read_text()


@pytest.mark.parametrize("dying", [0, 1])
def test_a_command_that_is_killed_ends_the_other(nodes: Nodes, dying: int) -> None:
    pair = [nodes.start(node, "first.seconds=60") for node in (0, 1)]
    nodes.wait_for("toy log line", node=1)
    pair[dying].kill()
    began = time.monotonic()
    code, said = ended(pair[1 - dying])
    assert code == 1 and time.monotonic() - began < 30
    assert ("node 1 (127.0.0.1) is gone" if dying else "node 0 (127.0.0.1) is gone") in said
    pair[dying].communicate()


def test_a_worker_that_fails_elsewhere_is_named(nodes: Nodes) -> None:
    pair = [nodes.start(node, "first.fail=rank 1", "first.seconds=0.5") for node in (0, 1)]
    (code, said), (other, heard) = ended(pair[0]), ended(pair[1])
    assert (code, other) == (1, 1)
    assert "rank 1 on node 1: ValueError: only rank 1" in said and "first.node1.log" in said
    assert "node 0 ended the run" in heard


def test_an_interrupt_anywhere_stops_all(nodes: Nodes) -> None:
    pair = [nodes.start(node, "first.seconds=60") for node in (0, 1)]
    nodes.wait_for("toy log line", node=1)
    nodes.wait_for("toy log line", node=0)
    pair[1].send_signal(signal.SIGTERM)
    assert [ended(process)[0] for process in pair] == [143, 143]


def test_a_node_that_does_not_answer_holds_nobody_up(nodes: Nodes) -> None:
    """Node 0's own rank is done, node 1's command sleeps: an interrupt is heard all the same."""
    pair = [nodes.start(node, "first.seconds=2") for node in (0, 1)]
    nodes.wait_for("toy log line", node=1)
    pair[1].send_signal(signal.SIGSTOP)
    try:
        until = time.monotonic() + 60
        while not list(nodes.root.rglob("result.json")):
            assert time.monotonic() < until
            time.sleep(0.1)
        time.sleep(1.0)
        pair[0].send_signal(signal.SIGINT)
        assert ended(pair[0], within=30)[0] == 130
    finally:
        pair[1].kill()
        pair[1].communicate()


def test_a_node_that_says_nothing_after_a_failure_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "GRACE_SECONDS", 0.3)
    workers = Workers(settings(processes=2, node_rank=0, preload=False), log=tmp_path / "server.log")
    ours, theirs = socket.socketpair()
    workers._followers = [Link(ours, 1, "there")]
    request, gone = request_of(tmp_path, fail="crash"), Link(theirs, 0, "here")
    try:
        ended = workers.run(request, log=tmp_path / "row.log", processes=2, on_event=lambda event: None)
        assert ended.code == 1 and "rank 0" in str(ended.message)
    finally:
        workers.close(1)
    row, *rest = gone.receive()
    assert "row" in row and rest == [{"signal": signal.SIGKILL}, {"end": 1}]
    gone.close()


def request_of(root: Path, **config: Any) -> Path:
    from toy_stages import ask  # of this directory, which others that import this module do not have on their path

    return ask(root, **config)


class Follower:
    """Node 1 of 2 in a thread; `lead` is node 0's end of its link."""

    def __init__(self, root: Path) -> None:
        ours, theirs = socket.socketpair()
        self.lead, self.link = Link(theirs, 1, "there"), Link(ours, 0, "here")
        self.workers = Workers(settings(processes=2, node_rank=1, preload=False), log=root / "server.log")
        self.log = root / "row.log"
        self.request = request_of(root, seconds=60.0)
        document = json.loads(self.request.read_text())
        document["launch"] = self.workers.launch.model_dump(mode="json")
        self.request.write_text(json.dumps(document))
        self.thread, self.found = in_thread(self._work)

    def _work(self) -> None:
        for row in orders(self.link):
            self.workers.follow(self.link, row)

    def row(self, **more: Any) -> dict[str, Any]:
        told = {"request": str(self.request), "digest": sha256_file(self.request), "log": str(self.log)}
        return {"row": told | more}

    def close(self) -> None:
        self.lead.close()
        self.thread.join(30)
        self.workers.close()
        self.link.close()


@pytest.fixture
def follower(tmp_path: Path) -> Iterator[Follower]:
    made = Follower(tmp_path)
    yield made
    made.close()


def test_an_end_in_the_middle_of_a_row_ends_it_with_its_code(follower: Follower) -> None:
    """Node 0 was interrupted before its own ranks were there."""
    follower.lead.send(follower.row())
    log, until = log_of(follower.log, 1), time.monotonic() + 60
    while not (log.exists() and "toy log line" in log.read_text()):
        assert time.monotonic() < until
        time.sleep(0.02)
    follower.lead.send({"end": 143})
    follower.lead.close()
    follower.thread.join(30)
    assert [getattr(error, "exit_code", None) for error in follower.found] == [143]


@pytest.mark.parametrize(
    ("more", "said"), [({"request": "/nowhere"}, "is not there on node 1"), ({"digest": "0" * 64}, "is another file")]
)
def test_a_request_that_is_not_node_0s_is_refused(follower: Follower, more: dict[str, str], said: str) -> None:
    """Without a shared file system an earlier run here may have left one of the same name."""
    follower.lead.send(follower.row(**more))
    follower.lead.socket.settimeout(30)
    (answer,) = follower.lead.receive()
    assert answer["exited"] == [{"rank": 1, "code": 2, "signal": None}] and said in answer["errors"][0]["message"]


def test_a_signal_that_comes_together_with_a_row_reaches_it(follower: Follower) -> None:
    follower.lead.socket.sendall(b"".join(json.dumps(m).encode() + b"\n" for m in (follower.row(), {"signal": 9})))
    follower.lead.socket.settimeout(30)
    (answer,) = follower.lead.receive()
    assert [end["signal"] for end in answer["exited"]] == [9]


def settings(**more: Any) -> LaunchSettings:
    given = {"processes": 4, "nodes": 2, "strategy": "ddp", "main_address": "127.0.0.1", "main_port": two_ports()}
    return launch_settings(given | more)


def in_thread(function: Any) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, found


def test_a_node_that_differs_is_refused_and_the_right_one_still_taken() -> None:
    launch, said = settings(), []  # type: LaunchSettings, list[str]
    thread, found = in_thread(lambda: gather(launch, said.append, seconds=30))
    with _connected(launch) as scanner:
        scanner.sendall(b"GET / HTTP/1.1\r\n\r\n")
    other = launch.model_copy(update={"processes": 2})
    with pytest.raises(RowFailed, match="node 1 differs: processes 2 there, 4 on node 0"):
        list(orders(call(other, 1, said.append, seconds=10)))
    with pytest.raises(RowFailed, match=r"node 7 is not one of those still waited for \(node 1\)"):
        list(orders(call(launch, 7, said.append, seconds=10)))
    link = call(launch, 1, said.append, seconds=10)
    thread.join(30)
    (links,) = found
    assert [one.node for one in links] == [1]
    links[0].send({"row": {"request": "r", "log": "l"}})
    links[0].send({"end": 0})
    assert list(orders(link)) == [{"request": "r", "log": "l"}]
    for one in (*links, link):
        one.close()


def test_a_hello_may_come_in_pieces() -> None:
    launch = settings()
    thread, found = in_thread(lambda: gather(launch, lambda text: None, seconds=10))
    hello = json.dumps({"hello": {"node": 1} | introduction(launch)}).encode() + b"\n"
    with _connected(launch) as caller:
        for piece in (hello[:1], hello[1:200], hello[200:]):
            caller.sendall(piece)
            time.sleep(0.2)
        thread.join(20)
    assert [link.node for link in found[0]] == [1]


@pytest.mark.parametrize("node", [[1], {}, True, 1.0, "1", None])
def test_a_caller_with_an_odd_number_is_refused(node: Any) -> None:
    launch, said = settings(), []  # type: LaunchSettings, list[str]
    thread, found = in_thread(lambda: gather(launch, said.append, seconds=10))
    with _connected(launch) as odd:
        odd.sendall(json.dumps({"hello": {"node": node} | introduction(launch)}).encode() + b"\n")
        assert f"node {node!r} is not one of those" in Link(odd, 0, "here").receive()[0]["refused"]
    link = call(launch, 1, said.append, seconds=10)
    thread.join(20)
    assert [one.node for one in found[0]] == [1]
    link.close()


def test_a_caller_that_trickles_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "HELLO_SECONDS", 0.5)
    launch = settings()
    thread, found = in_thread(lambda: gather(launch, lambda text: None, seconds=20))
    with _connected(launch) as slow:
        link, began = call(launch, 1, lambda text: None, seconds=10), time.monotonic()
        while thread.is_alive() and time.monotonic() - began < 8:
            with contextlib.suppress(OSError):
                slow.sendall(b" ")
            time.sleep(0.1)
    assert not thread.is_alive() and [one.node for one in found[0]] == [1]
    link.close()


@pytest.mark.parametrize("answer", [b"", b"220 mail ready\r\n", b'{"hello": 1}\n'])
def test_something_else_at_node_0s_port_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    monkeypatch.setattr(nodes_module, "ANSWER_SECONDS", 0.3)
    launch = settings()
    with socket.create_server(("127.0.0.1", launch.main_port)) as service:
        thread, found = in_thread(lambda: call(launch, 1, lambda text: None, seconds=10))
        connection, _ = service.accept()
        connection.sendall(answer)
        thread.join(10)
        connection.close()
    assert not thread.is_alive() and "is not node 0 of a run: set another launch.main_port" in str(found[0])


def test_a_run_that_does_not_start_on_node_0_ends_on_the_others(nodes: Nodes) -> None:
    """Its plan is wrong on node 0 alone; node 1 called before."""
    other = nodes.start(1)
    assert other.stderr is not None and "calling node 0" in other.stderr.readline()
    code, said = ended(nodes.start(0, "first.word={}"))
    assert code == 2 and "node 1 of 2 hear of it within 30 s" in said and "first.word" in said
    code, said = ended(other, within=20)
    assert code == 2 and "node 0 ended the run; its messages say why" in said


def test_nodes_that_have_come_hear_of_an_interrupt() -> None:
    launch, said = settings(processes=3, nodes=3), []  # type: LaunchSettings, list[str]

    def say(text: str) -> None:
        if text.endswith("for node 2 of 3"):
            raise Interrupted(signal.SIGTERM)

    thread, found = in_thread(lambda: gather(launch, say, seconds=20))
    with pytest.raises(RowFailed, match="node 0 ended the run") as ended:
        list(orders(call(launch, 1, said.append, seconds=10)))
    thread.join(30)
    assert ended.value.exit_code == found[0].exit_code == 143


def test_a_node_that_left_may_come_again() -> None:
    launch, said = settings(processes=3, nodes=3), []  # type: LaunchSettings, list[str]
    thread, found = in_thread(lambda: gather(launch, said.append, seconds=20))
    call(launch, 1, said.append, seconds=10).close()
    links = [call(launch, node, said.append, seconds=10) for node in (1, 2)]
    thread.join(30)
    assert [one.node for one in found[0]] == [1, 2] and not any("refused" in text for text in said)
    found[0][0].send({"end": 0})
    assert list(orders(links[0])) == []
    for link in links:
        link.close()


def _connected(launch: LaunchSettings) -> socket.socket:
    until = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection(("127.0.0.1", launch.main_port))
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_nodes_that_never_come_are_named() -> None:
    launch = settings(processes=3, nodes=3)
    thread, found = in_thread(lambda: gather(launch, lambda text: None, seconds=3))
    link = call(launch, 2, lambda text: None, seconds=10)
    thread.join(30)
    assert "3 asked for, but node 1 did not call" in str(found[0])
    with pytest.raises(RowFailed, match="refused this node: node 1 never came"):
        list(orders(link))
    with pytest.raises(RowFailed, match="does not answer"):
        call(launch, 1, lambda text: None, seconds=0.0)


def test_an_address_that_is_not_ours_is_told() -> None:
    with pytest.raises(UserError, match=r"launch.main_address: node 0 cannot listen on 192\.0\.2\.1"):
        gather(settings(main_address="192.0.2.1"), print, seconds=1)


def test_what_arrives_is_bounded() -> None:
    ours, theirs = socket.socketpair()
    link = Link(ours, 1, "there")
    thread = threading.Thread(target=_flood, args=(theirs,))
    thread.start()
    with pytest.raises(LinkGone, match="too long"):
        while True:
            link.receive()
    link.close()
    thread.join(10)
    for data in (b"[1]\n", b"{\n", b"[" * 100_000 + b"\n"):
        ours, theirs = socket.socketpair()
        theirs.sendall(data)
        theirs.close()
        with pytest.raises(LinkGone, match="no message"):
            while True:
                Link(ours, 1, "there").receive()


def _flood(end: socket.socket) -> None:
    try:
        for _ in range(4 * LINE_BYTES // 65536):
            end.sendall(b"x" * 65536)
    except OSError:
        pass


def test_which_node_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NODE_RANK", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    assert node_of(LaunchSettings()) == 0 and node_of(settings(node_rank=1)) == 1
    with pytest.raises(UserError, match=r"launch.node_rank: 2 nodes, but which one is this\?"):
        node_of(settings())
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert node_of(settings()) == 1
    monkeypatch.setenv("NODE_RANK", "2")
    with pytest.raises(UserError, match="NODE_RANK=2: expected the number of this node, 0 to 1"):
        node_of(settings())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"processes": 3}, "launch.nodes: 2 cannot share launch.processes equally: 3, over all nodes"),
        ({"processes": 514}, "launch.processes: 514, but there are at most 256 on a node"),
        ({"main_address": None}, "launch.nodes: 2 nodes: set launch.main_address"),
        ({"node_rank": 2}, "launch.node_rank: 2, but launch.nodes is 2: nodes count from 0"),
        ({"main_port": 65535}, "main_port"),
    ],
)
def test_settings_that_contradict_each_other(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        settings(**given)


def test_another_plan_on_another_node_is_told(nodes: Nodes) -> None:
    lead, other = nodes.start(0), nodes.start(1, "first.word=other")
    code, said = ended(other)
    assert code == 1 and "node 1 differs: plan " in said
    lead.send_signal(signal.SIGINT)
    assert ended(lead)[0] == 130


def test_what_must_agree_leaves_out_what_may_differ() -> None:
    one, other = settings(main_port=5000), settings(main_port=5000, threads=3, main_address="localhost", node_rank=1)
    assert introduction(one) == introduction(other)
    assert introduction(one) != introduction(settings(main_port=5000, strategy="fsdp"))
