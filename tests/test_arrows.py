"""Who may import whom: the arrows of the design, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {  # package -> packages of this project that it must not import
    "pipeline/algo": {"flow", "cli", "llama", "data", "rollout", "train", "evaluate", "report", "stages"},
    "pipeline/flow": {"cli", "llama", "data", "rollout", "train", "evaluate", "report", "stages", "algo"},
    "pipeline/data": {"cli", "llama", "rollout", "train", "evaluate", "report", "stages"},
    "pipeline/llama": {"cli", "rollout", "train", "evaluate", "report", "stages"},
    "pipeline/rollout": {"cli", "train", "evaluate", "report", "stages"},
    "pipeline/estimate": {"cli", "algo", "data", "rollout", "train", "evaluate", "report", "stages"},
    "pipeline/train": {"cli", "rollout", "evaluate", "report", "stages"},
    "pipeline/evaluate": {"cli", "train", "stages"},
    "pipeline/report": {"cli", "train", "stages", "rollout"},
    "stages": {"cli"},
}


def imported(path: Path) -> set[str]:
    """Packages of this project that a file imports, inside functions too: "data", "llama", ... and "stages.x"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        for name in names:
            parts = name.split(".")
            if parts[0] == "pipeline" and len(parts) > 1:
                found.add(parts[1])
            if parts[0] == "stages":
                found.add("stages")
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_follow_the_arrows(package: str):
    for path in (ROOT / package).glob("*.py"):
        wrong = imported(path) & FORBIDDEN[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_stages_never_import_each_other():
    for path in (ROOT / "stages").glob("*.py"):
        assert "stages" not in imported(path), path.name


def test_control_plane_is_free_of_torch():
    for path in (ROOT / "pipeline" / "flow").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] in ("torch", "transformers") for n in names), path.name
