"""Other people's code that is no dependency of this project: installed apart, on first use, from the package index."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.common import say

CACHE = Path(__file__).resolve().parents[2] / ".bench"
TRL_WITH_PPO = "1.12.0"  # the last one with `trl.experimental.ppo`; runs on the installed torch and transformers


def trl_with_ppo() -> Path:
    """A directory that holds nothing but this version of TRL, to stand before the installed packages."""
    return apart("trl", TRL_WITH_PPO)


def apart(package: str, version: str) -> Path:
    """`package==version` in a directory of its own, without what it depends on. RuntimeError where that fails."""
    place = CACHE / f"{package}-{version}"
    if place.is_dir():
        return place
    say(f"installing {package}=={version} into {place}, apart from the project's own packages")
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        made = Path(folder) / "packages"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*command, "--target", str(made), f"{package}=={version}"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(
                f"{package}=={version} could not be installed, so there is no rival to measure against (a package "
                f"index is needed once; afterwards {place} is used as it is):\n{done.stderr[-2000:]}"
            )
        os.rename(made, place)
    return place
