"""Several machines: the same command on each of them. Node 0 plans, locks, seals and shows; the others follow it.

    node 0   rlhf run PLAN --set launch.nodes=2 --set launch.main_address=HOST --set launch.node_rank=0
    node 1   the same with node_rank=1: calls node 0, starts its share of the ranks of every row that node 0 names

They talk over TCP (`main_port`), in JSON lines; torch.distributed meets on the port above it:

    follower -> node 0   {"hello": {"node": 1, "nodes": 2, ...}}          what must agree, `introduction`
    node 0 -> follower   {"welcome": 1} | {"refused": why}, at once
                         {"row": {"request", "digest", "log"}} | {"signal": 9} | {"end": code}
    follower -> node 0   {"exited": [...], "errors": [...]}               once its ranks of the row have ended

Store and run directory lie on a file system that all nodes share, at the same path. A node that goes away ends the row
on all of them; whoever can reach the port can end it too, as with torch.distributed's own, so it belongs in a closed
network.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.flow.artifacts import canonical, sha256_bytes, sha256_file
from pipeline.flow.errors import RowFailed, UserError
from pipeline.flow.forkserver import Lines

if TYPE_CHECKING:
    from pipeline.flow.launch import LaunchSettings

WAIT_SECONDS = 600.0  # for the other nodes, at the start of a run
HELLO_SECONDS = 10.0  # for a caller to say who it is
ANSWER_SECONDS = 60.0  # for node 0 to answer: it hears callers one after the other
DISMISS_SECONDS = 30.0  # for callers to hear that the run does not start
LINE_BYTES = 1 << 20
RANK_VARIABLES = ("NODE_RANK", "SLURM_NODEID")
NOT_SHARED = "{}: is {} on node {}: store and run directory must lie on a file system that all nodes share"
Say = Callable[[str], None]


class LinkGone(Exception):
    """The other end of a link is gone."""


class Link:
    """A connection between node 0 and another node; `node` is the other one's rank."""

    def __init__(self, connection: socket.socket, node: int, host: str) -> None:
        self.socket, self.node, self.host = connection, node, host
        self.unread: list[dict[str, Any]] = []  # messages that came together with one that had to be followed first
        self._lines, self._size = Lines(), 0
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A machine without power says nothing: the kernel finds out within 40 seconds.
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name) and connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: Mapping[str, Any]) -> None:
        """What cannot be delivered is no error here: `receive` finds the end."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """Messages that have arrived; waits for some bytes. LinkGone at the end, or where they are no messages."""
        if self.unread:
            messages, self.unread = self.unread, []
            return messages
        try:
            data = self.socket.recv(1 << 16)
        except OSError as error:
            raise LinkGone(str(error)) from error
        self._size = self._size + len(data) if b"\n" not in data else len(data)
        if not data or self._size > LINE_BYTES:
            raise LinkGone("closed" if not data else "a line that is too long")
        try:
            messages = [json.loads(line) for line in self._lines.feed(data)]
        except (ValueError, RecursionError) as error:
            raise LinkGone(f"no message: {error}") from error
        if not all(isinstance(message, dict) for message in messages):
            raise LinkGone("no message")
        return messages

    def left(self) -> bool:
        """Whether the other end has closed the link; of one that has nothing to say yet."""
        self.socket.setblocking(False)
        try:
            return not self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.socket.setblocking(True)

    def close(self) -> None:
        self.socket.close()


def node_of(launch: LaunchSettings) -> int:
    """Which node this is: `launch.node_rank`, else what the cluster says. UserError where nobody does."""
    if launch.nodes == 1:
        return 0
    if launch.node_rank is not None:
        return launch.node_rank
    for name in RANK_VARIABLES:
        if (text := os.environ.get(name)) is not None:
            if not text.isdecimal() or int(text) >= launch.nodes:
                raise UserError(f"{name}={text}: expected the number of this node, 0 to {launch.nodes - 1}")
            return int(text)
    raise UserError(
        f"launch.node_rank: {launch.nodes} nodes, but which one is this? Set it to 0 on the node that leads and to 1, "
        f"2, ... on the others, or set {' or '.join(RANK_VARIABLES)} in the environment"
    )


def introduction(launch: LaunchSettings, plan: str = "") -> dict[str, Any]:
    """What must be the same on every node. `plan`: digest of the plan (`digest_of`)."""
    from pipeline.flow.stage import PACKAGES, has_kernel

    packages = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    asked = launch.model_dump(mode="json", exclude={"node_rank", "threads", "main_address", "preload"})
    return (
        asked | {"plan": plan, "python": platform.python_version(), "kernel": has_kernel(), "code": _code()} | packages
    )


def digest_of(document: Mapping[str, Any], run: str) -> str:
    """Of a plan as resolved, under the name of its run; where it runs is compared by itself."""
    return sha256_bytes(canonical([run, {key: value for key, value in document.items() if key != "launch"}]))[:16]


def _code() -> str:
    """Digest of this project's own source files."""
    root = Path(__file__).resolve().parents[2]
    files = sorted(f for part in ("pipeline", "stages") for f in (root / part).rglob("*") if f.suffix in (".py", ".c"))
    names = "".join(f"{file.relative_to(root)} {sha256_file(file)}\n" for file in files)
    return hashlib.sha256(names.encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------- node 0


def gather(launch: LaunchSettings, say: Say, plan: str = "", seconds: float = WAIT_SECONDS) -> list[Link]:
    """Wait for the other nodes of the run: one link each, by rank.

    RowFailed where some do not come in time, UserError where the address is not one of this machine's.
    """
    ours, links = introduction(launch, plan), {}  # type: dict[str, Any], dict[int, Link]
    address = (launch.main_address or "", launch.main_port)
    try:
        listener = _listener(address)
    except OSError as error:
        raise UserError(
            f"launch.main_address: node 0 cannot listen on {address[0]} port {address[1]} ({error}); give an address "
            "of node 0 that the other nodes reach, and a free launch.main_port with a free one above it"
        ) from error
    deadline = time.monotonic() + seconds
    told: set[int] = set()
    with listener, _ended_early(links):
        while missing := _missing(launch, links):
            if missing != told:
                say(f"waiting at {address[0]}:{address[1]} for {_named(missing)} of {launch.nodes}")
                told = missing
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, peer = listener.accept()
            except TimeoutError:
                for link in links.values():
                    link.send({"refused": f"{_named(missing)} never came"})
                raise RowFailed(
                    f"launch.nodes: {launch.nodes} asked for, but {_named(missing)} did not call {address[0]}:"
                    f"{address[1]} within {seconds:.0f} s: start the same command there"
                ) from None
            missing = _missing(launch, links)
            if (caller := _welcome(connection, str(peer[0]), ours, missing, say)) is not None:
                links[caller.node] = caller
    return [links[node] for node in sorted(links)]


def dismiss(launch: LaunchSettings, say: Say, code: int, seconds: float = DISMISS_SECONDS) -> None:
    """On node 0, where the run ends before the others were gathered: those that call in this time end with it."""
    missing, deadline = set(range(1, launch.nodes)), time.monotonic() + seconds
    say(f"the run does not start; {_named(missing)} of {launch.nodes} hear of it within {seconds:.0f} s")
    with contextlib.suppress(OSError), _listener((launch.main_address or "", launch.main_port)) as listener:
        while missing:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            connection, peer = listener.accept()
            link = Link(connection, -1, str(peer[0]))
            if (hello := _hello(link)) is not None:
                link.send({"end": code})
                missing -= {node for node in missing if node == hello.get("node")}
            link.close()


def _listener(address: tuple[str, int]) -> socket.socket:
    family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server(address, family=family)


@contextlib.contextmanager
def _ended_early(links: Mapping[int, Link]) -> Iterator[None]:
    """The nodes that have come hear of it where the run ends before all are there: of a signal, say."""
    try:
        yield
    except BaseException as error:
        for link in links.values():
            link.send({"end": getattr(error, "exit_code", 1)})
            link.close()
        raise


def _missing(launch: LaunchSettings, links: dict[int, Link]) -> set[int]:
    """The nodes that are still to come; links to nodes that have left again go out of `links`."""
    for link in [link for link in links.values() if link.left()]:
        links.pop(link.node).close()
    return set(range(1, launch.nodes)) - links.keys()


def _welcome(connection: socket.socket, host: str, ours: Mapping[str, Any], missing: set[int], say: Say) -> Link | None:
    """A link to a caller that is one of the missing nodes and agrees with us; else None, and the caller told why."""
    link = Link(connection, -1, host)
    if (hello := _hello(link)) is None:
        connection.close()  # a port scanner, say
        return None
    node = hello.pop("node", None)
    if why := _refused(node, hello, ours, missing):
        link.send({"refused": why})
        connection.close()
        say(f"refused a caller from {host}: {why}")
        return None
    connection.settimeout(None)
    link.node = node
    link.send({"welcome": 1})
    return link


def _hello(link: Link) -> dict[str, Any] | None:
    """Who a caller says to be; None where it is no node, or says nothing in time."""
    messages = _first(link, HELLO_SECONDS)
    hello = messages[0].get("hello") if messages else None
    return hello if isinstance(hello, dict) else None


def _first(link: Link, seconds: float) -> list[dict[str, Any]]:
    """What the other end says first, maybe in several pieces; nothing where it says nothing in time, or no messages."""
    deadline = time.monotonic() + seconds
    messages: list[dict[str, Any]] = []
    try:
        while not messages:
            link.socket.settimeout(max(0.01, deadline - time.monotonic()))
            messages = link.receive()
    except LinkGone:
        return []
    return messages


def _refused(node: Any, hello: Mapping[str, Any], ours: Mapping[str, Any], missing: set[int]) -> str | None:
    if type(node) is not int or node not in missing:  # a list has no hash, and True is 1
        return f"node {node!r} is not one of those still waited for ({_named(missing)}): check launch.node_rank"
    differs = [name for name in sorted({*ours, *hello}) if ours.get(name) != hello.get(name)]
    if differs:
        words = ", ".join(f"{name} {hello.get(name)} there, {ours.get(name)} on node 0" for name in differs)
        return f"node {node} differs: {words}"
    return None


def _named(nodes: set[int]) -> str:
    """
    >>> _named({2, 1})
    'nodes 1, 2'
    """
    return f"node{'s' if len(nodes) > 1 else ''} {', '.join(str(node) for node in sorted(nodes))}"


# --------------------------------------------------------------------------------------------------- the others


def call(launch: LaunchSettings, node: int, say: Say, plan: str = "", seconds: float = WAIT_SECONDS) -> Link:
    """A link to node 0, which is called until it answers. RowFailed where it does not, or where something else does."""
    address = (launch.main_address or "", launch.main_port)
    deadline = time.monotonic() + seconds
    said = False
    while True:
        try:
            connection = socket.create_connection(address, timeout=HELLO_SECONDS)
            if connection.getsockname() != connection.getpeername():  # else the port called itself
                break
            connection.close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise RowFailed(
                    f"launch.main_address: node 0 does not answer at {address[0]}:{address[1]} ({error}): start the "
                    "same command there, with launch.node_rank 0"
                ) from error
        if not said:
            say(f"node {node} of {launch.nodes}: calling node 0 at {address[0]}:{address[1]}")
            said = True
        time.sleep(0.2)
    link = Link(connection, 0, address[0])
    link.send({"hello": {"node": node} | introduction(launch, plan)})
    link.unread = _first(link, ANSWER_SECONDS)
    if not link.unread or not link.unread[0].keys() & {"welcome", "refused", "end"}:
        link.close()
        raise RowFailed(
            f"launch.main_port: something answers at {address[0]}:{address[1]}, but it is not node 0 of a run: set "
            "another launch.main_port, the same on every node"
        )
    connection.settimeout(None)
    return link


def orders(link: Link) -> Iterator[dict[str, Any]]:
    """The rows that node 0 names, until it ends. RowFailed where it refuses us, goes away, or a row failed there."""
    while True:
        try:
            messages = link.receive()
        except LinkGone:
            raise RowFailed(GONE.format(link.host)) from None
        for number, message in enumerate(messages):
            if "refused" in message:
                raise RowFailed(f"node 0 refused this node: {message['refused']}")
            if "end" in message:
                if message["end"]:
                    error = RowFailed("node 0 ended the run; its messages say why")
                    error.exit_code = int(message["end"])
                    raise error
                return
            if "row" in message:
                link.unread = messages[number + 1 :]  # a signal to this row, say
                yield message["row"]
                break


GONE = "node 0 ({}) is gone: the same command on every node goes on after the last checkpoint"


def log_of(log: Path, node: int) -> Path:
    """Where a node's ranks write what they print: node 0 into the row's log, the others beside it."""
    return log if node == 0 else log.with_suffix(f".node{node}.log")
