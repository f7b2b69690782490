"""Rows killed by the real command line, once or many times, end on the bits of a row that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

LONG = {  # enough steps to be killed in
    "pretrain": ["pretrain.train.steps=61"],
    "sft": ["sft.train.batch=2"],
    "reward": ["reward.train.batch=2"],
    "ppo": ["ppo.iterations=9"],
    "rejection": ["rejection.train.batch=1"],
    "dpo": ["dpo.train.batch=1"],
}
LONGER = {  # enough to be killed in twenty times
    "pretrain": ["pretrain.train.steps=600"],
    "sft": ["sft.train.epochs=25"],
    "reward": ["reward.train.epochs=30"],
    "ppo": ["ppo.iterations=60"],
    "rejection": ["rejection.train.epochs=40"],
    "dpo": ["dpo.train.epochs=60"],
}
DDP = ["launch.processes=2", "launch.strategy=ddp", "launch.threads=1"]


def command(row: str, name: str, settings: list[str]) -> list[str]:
    told = [word for setting in settings for word in ("--set", setting)]
    return [sys.executable, "-m", "pipeline", "run", "plan.yaml", "--until", row, "--name", name, *told]


def settings_of(row: str, test: int, *more: str) -> list[str]:
    """`test` makes it a row of its own, which no other test has sealed."""
    return [*LONG[row], f"{row}.train.eps={test}e-12", f"{row}.train.checkpoint_every=1", *more]


class Try:
    """One start of the command, which ends with the test at the latest."""

    def __init__(self, chain: Any, row: str, name: str, settings: list[str], **environment: str) -> None:
        self.log = chain.directory / f"{name}.txt"
        self.place = chain.directory / "store" / "partial"
        self.metrics = chain.directory / "runs" / name / "metrics" / f"{row}.jsonl"
        with open(self.log, "w") as file:
            self.process = subprocess.Popen(
                command(row, name, settings),
                cwd=chain.directory, stdout=file, stderr=subprocess.STDOUT,
                env=os.environ | environment, start_new_session=True,
            )  # fmt: skip

    def wait_for_steps(self, count: int) -> bool:
        """Until the row has logged so many steps; False where it ended before."""
        deadline = time.monotonic() + 120
        while self.steps() < count:
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)
        return True

    def steps(self) -> int:
        return self.metrics.read_bytes().count(b"\n") if self.metrics.exists() else 0

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def same_again(chain: Any, row: str, settings: list[str]) -> bool:
    """Whether the sealed row, computed once more without a break, has the same digests."""
    told = [word for setting in settings for word in ("--set", setting)]
    again = chain.rlhf("stage", "plan.yaml", row, "--force", "--json", *told)
    assert again.returncode == 0, again.stderr
    return bool(json.loads(again.stdout)["same"])


@pytest.mark.parametrize("row", ["sft", "ppo"])
def test_killed_once_it_goes_on_to_the_same_bits(chain: Any, first: Any, row: str) -> None:
    settings = settings_of(row, 1)
    begun = Try(chain, row, f"once-{row}", settings)
    assert begun.wait_for_steps(3)
    begun.kill()
    done = subprocess.run(
        command(row, f"once-{row}", settings), cwd=chain.directory, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "from its checkpoint" in done.stderr
    assert same_again(chain, row, settings)


@pytest.mark.slow
@pytest.mark.parametrize("row", list(LONG))
def test_killed_twenty_times_at_random_it_ends_on_the_same_bits(chain: Any, first: Any, row: str) -> None:
    """SIGKILL to the whole run at a random moment after its start, saves included."""
    draw = random.Random(row)
    settings, name, kills = settings_of(row, 2, *LONGER[row]), f"often-{row}", 0
    while kills < 20:
        begun = Try(chain, row, name, settings)
        there = begun.steps()
        if draw.random() < 0.7 and not begun.wait_for_steps(there + 1):
            break  # it ended before it could be killed again
        time.sleep(draw.random() * 0.5)
        begun.kill()
        kills += 1
    assert kills == 20
    done = subprocess.run(
        command(row, name, settings), cwd=chain.directory, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert same_again(chain, row, settings)


def test_one_of_two_ranks_killed_ends_the_other_and_the_same_command_goes_on(chain: Any, first: Any) -> None:
    settings = settings_of("sft", 3, *DDP)
    begun = Try(chain, "sft", "ranks", settings)
    assert begun.wait_for_steps(3)
    ranks = workers_below(begun.process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    ended = time.monotonic()
    assert begun.process.wait(timeout=60) == 1
    assert time.monotonic() - ended < 60 and "was killed (SIGKILL" in begun.log.read_text()
    done = subprocess.run(
        command("sft", "ranks", settings), cwd=chain.directory, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "from its checkpoint" in done.stderr
    assert same_again(chain, "sft", settings)


@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)],
)
def test_a_signal_saves_and_says_how_to_go_on(chain: Any, first: Any, number: signal.Signals, code: int) -> None:
    settings = settings_of("sft", code, "sft.train.checkpoint_every=100")  # the signal makes the only one
    begun = Try(chain, "sft", f"signal-{code}", settings)
    assert begun.wait_for_steps(2)
    begun.process.send_signal(number)
    assert begun.process.wait(timeout=60) == code
    told = begun.log.read_text()
    assert (
        "ends its step and saves; again to leave at once" in told
        and "stopped after step" in told
        and "the same command goes on" in told
    )
    assert "Traceback" not in told
    done = chain.rlhf(
        "run", "plan.yaml", "--until", "sft", "--name", f"signal-{code}", *[w for s in settings for w in ("--set", s)]
    )
    assert done.returncode == 0 and "goes on after step" in done.stderr
    assert same_again(chain, "sft", settings)


@pytest.mark.slow
def test_no_rank_leaves_before_a_slow_save_is_done(chain: Any, first: Any, shim: Path) -> None:
    """Ranks that are done may not take the one that still writes with them: once one is gone it has 5 seconds."""
    settings = settings_of("sft", 4, *DDP, "sft.train.checkpoint_every=100")
    begun = Try(chain, "sft", "slow", settings, LD_PRELOAD=str(shim), FAULT="/checkpoints/.tmp- 3 -2")
    assert begun.wait_for_steps(2)
    begun.process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    assert begun.process.wait(timeout=60) == 143
    assert time.monotonic() - asked > 7 and "stopped after step" in begun.log.read_text()
    told = [word for setting in settings for word in ("--set", setting)]
    done = chain.rlhf("run", "plan.yaml", "--until", "sft", "--name", "slow", *told)
    assert done.returncode == 0 and "goes on after step" in done.stderr


def workers_below(process: int) -> list[int]:
    """The ranks: the grandchildren of the command, in the order they were started."""
    children = lambda of: [
        int(stat.parent.name)
        for stat in Path("/proc").glob("[0-9]*/stat")
        if (text := read(stat)) and int(text.rsplit(")", 1)[1].split()[1]) == of
    ]
    servers = children(process)
    return sorted(rank for server in servers for rank in children(server))


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it ended meanwhile
        return ""
