"""Artifact kinds, their digests, and how files become artifacts.

    KINDS: dict[str, type[Artifact]]                 "policy" -> Policy, ...
    artifact_digest(kind, files) -> str              the identity of an artifact: kind, schema and contents
    describe(directory, kind, facts) -> dict         one slot of a manifest: kind, digest, files, lineage
    from_entry(entry) -> Artifact                    what a worker receives, sizes checked
    artifact.entry() -> dict                         the same, JSON
    tokenizer_facts(directory) -> dict               tokenizer and template digests of a model directory
    canonical(value) -> bytes, sha256_bytes, sha256_file, sync(path), safe_member(root, name)
    read_object(path) -> dict                        the JSON object in a regular file, size and nesting bounded

An artifact is files in one directory (a slot of a sealed row), or files of a user, read where they lie. Its
digest is sha256 of canonical JSON {kind, schema, files: {name: sha256}}: no times, paths or metrics.
Nothing here imports torch: planning must be fast.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from .errors import Damaged, UserError, anew

SCHEMA = 1
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".jsonl.gz", ".json.gz")
TEXT_SUFFIXES = (".txt", ".txt.gz", ".md")  # records only where documents are expected
TOKENIZER_STATE = ("truncation", "padding", "version")  # of tokenizer.json: set by use, not what it is
MOST_JSON = 256 * 2**20  # bytes of a JSON file; a tokenizer.json of 262,144 tokens has 33 MB
MOST_LEVELS = 64  # of nesting in a JSON file, as in a record
CHANGED = "{} changed while the row ran; run the same command again"  # a file of the user


@dataclass(frozen=True)
class Artifact:
    """Files with a known digest.

    path     directory that holds `files` (for files of a user: their common parent)
    files    names relative to `path`
    digest   identity by content
    lineage  facts: tokenizer and template digests, base, roots, whatever the stage noted
    meta     the manifest's entry of this slot, with row, stage and fingerprint where it came from a row
    format   what the user said about the format of a file source, or None
    part     which share of a file source is meant, [low, high) within [0, 1), or None for all of it
    bases    digest -> directory of every model below an adapter, nearest first
    """

    path: Path
    files: tuple[str, ...]
    digest: str
    lineage: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    format: str | None = None
    bases: Mapping[str, Path] = field(default_factory=dict)
    locations: tuple[Path, ...] = ()  # where files lie when that is not path / name
    part: tuple[float, float] | None = None

    kind: ClassVar[str] = ""
    is_model: ClassVar[bool] = False

    @property
    def paths(self) -> list[Path]:
        """Every file, in the order of `files`."""
        return list(self.locations) if self.locations else [self.path / name for name in self.files]

    @property
    def data_files(self) -> list[Path]:
        """The files that hold records. A file that the user named counts whatever its ending."""
        if self.locations:
            return self.paths
        suffixes = DATA_SUFFIXES + (TEXT_SUFFIXES if self.kind == "documents" else ())
        return [path for path in self.paths if path.name.endswith(suffixes)]

    def entry(self) -> dict[str, Any]:
        """JSON form, as it stands in a request."""
        return {
            "kind": self.kind,
            "path": str(self.path),
            "files": list(self.files),
            "locations": [str(path) for path in self.locations],
            "digest": self.digest,
            "lineage": dict(self.lineage),
            "meta": dict(self.meta),
            "format": self.format,
            "part": list(self.part) if self.part else None,
            "bases": {digest: str(path) for digest, path in self.bases.items()},
        }


class Tokenizer(Artifact):
    kind = "tokenizer"


class Documents(Artifact):
    kind = "documents"


class Conversations(Artifact):
    kind = "conversations"


class Comparisons(Artifact):
    kind = "comparisons"


class Rated(Artifact):
    kind = "rated"


class Prompts(Artifact):
    kind = "prompts"


class Samples(Artifact):
    kind = "samples"


class Policy(Artifact):
    kind = "policy"
    is_model = True


class RewardModel(Artifact):
    kind = "reward_model"
    is_model = True


class Judge(Artifact):
    kind = "judge"


class Evaluation(Artifact):
    kind = "evaluation"


KINDS: dict[str, type[Artifact]] = {
    cls.kind: cls
    for cls in (
        Tokenizer,
        Documents,
        Conversations,
        Comparisons,
        Rated,
        Prompts,
        Samples,
        Policy,
        RewardModel,
        Judge,
        Evaluation,
    )
}


def canonical(value: Any) -> bytes:
    """One spelling for one value: keys sorted, no spaces, NaN refused (ValueError)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "surrogatepass")


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """What was written to a file, or the names in a directory, is on the disk afterwards."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def artifact_digest(kind: str, files: Mapping[str, str]) -> str:
    """`files` maps names to sha256 of their content."""
    return sha256_bytes(canonical({"kind": kind, "schema": SCHEMA, "files": dict(files)}))


def safe_member(root: Path, name: str) -> Path:
    """The file `name` of `root`; UserError where the name or a link on its way leaves `root`."""
    pure = PurePosixPath(name)
    bad = not name or "\0" in name or "\\" in name or pure.is_absolute() or ".." in pure.parts
    if bad or not (root / name).resolve().is_relative_to(root.resolve()):
        raise UserError(f"{root}: the file name {name!r} leaves its directory; only files inside are read")
    return root / name


def members(directory: Path) -> Iterator[str]:
    """Names of the regular files below `directory`, sorted, without hidden ones; links that leave refused."""
    found = []
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for entry in [*names, *(f for f in folders if (Path(folder) / f).is_symlink())]:
            if not entry.startswith("."):
                found.append((Path(folder) / entry).relative_to(directory).as_posix())
    for name in sorted(found):
        path = safe_member(directory, name)
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: is not a regular file; devices, pipes and linked folders are not read")
        yield name


def describe(directory: Path, kind: str, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Hash a finished slot: {kind, digest, files: {name: {bytes, sha256}}, lineage}.

    Model and tokenizer directories get `tokenizer` and `template` digests into their lineage, an adapter the
    `form` "adapter" and the digest of its `base` and how that is quantised, any other model the `form` "full".
    """
    hashes = {name: sha256_file(directory / name) for name in members(directory)}
    files = {n: {"bytes": (directory / n).stat().st_size, "sha256": hashes[n]} for n in hashes}
    if not files:
        raise UserError(f"{directory}: the stage wrote no file for its output {directory.name!r} ({kind})")
    lineage = {**model_facts(directory, kind), **(facts or {})}
    return {"kind": kind, "digest": artifact_digest(kind, hashes), "files": files, "lineage": lineage}


def model_facts(directory: Path, kind: str) -> dict[str, Any]:
    """What a model or tokenizer directory says about itself; {} for every other kind."""
    if not KINDS[kind].is_model and kind != "tokenizer":
        return {}
    facts: dict[str, Any] = dict(tokenizer_facts(directory))
    if KINDS[kind].is_model:
        adapter = directory / "adapter_config.json"
        facts["form"] = "adapter" if adapter.is_file() else "full"
        if adapter.is_file():
            facts["base"] = read_object(adapter).get("base_model_name_or_path")
            quantisation = directory / "base_quantisation.json"
            facts |= {"base_quantisation": read_object(quantisation)} if quantisation.is_file() else {}
    return facts


def tokenizer_facts(directory: Path) -> dict[str, str]:
    """{tokenizer, template}: digests of what a tokenizer does and of its chat template, those that are there.

    Equal tokenizers give equal digests however their JSON is laid out; padding and truncation left set by use
    do not count.
    """
    facts = {}
    fast, pieces = directory / "tokenizer.json", directory / "tokenizer.model"
    if fast.is_file():
        content = {key: value for key, value in read_object(fast).items() if key not in TOKENIZER_STATE}
        facts["tokenizer"] = sha256_bytes(canonical(content))
    elif pieces.is_file():
        facts["tokenizer"] = sha256_file(pieces)
    template = _template(directory)
    if template is not None:
        facts["template"] = sha256_bytes(canonical(template))
    return facts


def _template(directory: Path) -> Any:
    jinja, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if jinja.is_file():
        return read_text(jinja).replace("\r\n", "\n").replace("\r", "\n")  # as transformers reads it
    return read_object(config).get("chat_template") if config.is_file() else None


def read_text(path: Path, refusal: type[UserError] = UserError, most: int = MOST_JSON) -> str:
    """The text of a file; raises `refusal` where it is no regular file (a pipe would be waited for, a device read for
    ever), has more than `most` bytes, or is no UTF-8."""
    if not path.is_file():
        raise refusal(f"{path}: {'is not a regular file' if path.exists() else 'is missing'}")
    if (size := path.stat().st_size) > most:
        raise refusal(f"{path}: has {size} bytes, at most {most} are read")
    try:
        return path.read_bytes().decode("utf-8")  # line ends as they are
    except UnicodeDecodeError as error:
        raise refusal(f"{path}: is not UTF-8 ({error})") from error


def read_object(path: Path, refusal: type[UserError] = UserError, most: int = MOST_JSON) -> dict[str, Any]:
    """The JSON object in a file; raises `refusal` naming the file where there is none, or it is nested too deeply."""
    try:
        value = json.loads(read_text(path, refusal, most))
    except (ValueError, RecursionError) as error:
        raise refusal(f"{path}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise refusal(f"{path}: expected a JSON object, found {type(value).__name__}")
    if not within_levels(value):
        raise refusal(f"{path}: is nested too deeply, more than {MOST_LEVELS} levels")
    return value


def within_levels(value: Any, most: int = MOST_LEVELS) -> bool:
    """Whether lists and mappings lie at most `most` deep in each other."""
    level = [value]
    for _ in range(most + 1):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))]
        if not inner:
            return True
        level = [item for items in inner for item in items]
    return False


def from_entry(entry: Mapping[str, Any]) -> Artifact:
    """The artifact of a request's entry. Where a file is missing or has another size: UserError for a file of the
    user, Damaged for a sealed one."""
    cls = KINDS[entry["kind"]]
    artifact = cls(
        path=Path(entry["path"]),
        files=tuple(entry["files"]),
        digest=entry["digest"],
        lineage=dict(entry.get("lineage") or {}),
        meta=dict(entry.get("meta") or {}),
        format=entry.get("format"),
        part=tuple(entry["part"]) if entry.get("part") else None,
        bases={digest: Path(path) for digest, path in (entry.get("bases") or {}).items()},
        locations=tuple(Path(path) for path in entry.get("locations") or ()),
    )
    check_sizes(artifact)
    return artifact


def check_sizes(artifact: Artifact) -> None:
    """UserError (a file of the user) or Damaged (a sealed one) where a file is missing or has another size."""
    recorded = artifact.meta.get("files", {})
    for name, path in zip(artifact.files, artifact.paths, strict=True):
        size = path.stat().st_size if path.is_file() else None
        expected = recorded.get(name, {}).get("bytes", size)
        if size is not None and size == expected:
            continue
        if "source" in artifact.meta:
            raise UserError(CHANGED.format(path))
        mend = f"(artifact {artifact.digest}); {anew(artifact.path.parent)}"
        if size is None:
            raise Damaged(f"{path}: missing, though its manifest lists it {mend}")
        raise Damaged(f"{path}: has {size} bytes, its manifest says {expected} {mend}")
