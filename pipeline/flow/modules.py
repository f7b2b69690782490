"""Where the source of a Python module lies, found without running any of it.

A plan may name modules whose functions a row calls. Planning reads their source (its digest is part of the row's
fingerprint) and leaves running it to the row's worker.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

from .artifacts import sha256_file
from .errors import UserError


def source_file(module: str) -> Path | None:
    """The .py file of an importable module; None where there is none. Parent packages are not imported either."""
    parts = module.split(".")
    spec: ModuleSpec | None = None
    for i in range(len(parts)):
        path = spec.submodule_search_locations if spec else None
        name = ".".join(parts[: i + 1])
        spec = next(filter(None, (finder.find_spec(name, path) for finder in sys.meta_path)), None)
        if spec is None or (i + 1 < len(parts) and spec.submodule_search_locations is None):
            return None
    if spec is None or not spec.has_location or not spec.origin or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)


def digests(modules: tuple[str, ...]) -> dict[str, str]:
    """{"module my_rewards": sha256 of its source}. UserError where a module has no source file."""
    found = {}
    for module in modules:
        file = source_file(module)
        if file is None:
            raise UserError(MISSING.format(module))
        found[f"module {module}"] = sha256_file(file)
    return found


MISSING = "no module {!r} with Python source can be imported: install it, or put its folder on PYTHONPATH"
