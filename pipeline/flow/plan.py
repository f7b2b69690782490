"""A plan: rows read from top to bottom, their wiring checked, their fingerprints, and why a row is stale.

    load_plan(plan, sets, stages) -> Plan          everything is checked that needs no file of the user
    Plan    .path .name .seed .launch .skip_bad .rows .sources .document .row(name)
    Row     .name .stage .target .cls .config .inputs .seed .code
    Ref     .text .row .slot, or .text .source for a file source
    check_sources(plan)                            UserError where a file that a row reads is not there
    survey(plan, store, accept_code=False) -> [RowState]
    state_of(plan, row, store, known=None, accept_code=False) -> RowState      `known`: row -> fingerprint
    request(plan, row, store, known=None) -> Request                           what its worker receives
    RowState  .row (name) .status "fresh" | "stale" | "pending" .fingerprint .why .waits_for
    differences(old, new) -> list[str]             two identities, in words

Nothing runs here and nothing is written, but for the memory of file hashes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .artifacts import SCHEMA, Artifact, canonical, sha256_bytes
from .config import Document, Settings, load_document, nearest
from .errors import UserError
from .stage import Request, Stage
from .store import Store

SHOWN = 4  # differences told before "and N more"
FIRST = "[0]"  # of a list slot, in `Stage.boundaries`


@dataclass(frozen=True)
class Ref:
    """What a row reads: "sft.policy" (an output of a row above) or "pairs" (a file source)."""

    text: str
    row: str | None = None
    slot: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Source:
    """Files of the user. `paths` is empty where the plan leaves them to `--set sources.NAME.path=FILE`.

    `same` names the source whose files these are.
    """

    name: str
    kind: type[Artifact]
    paths: tuple[Path, ...] = ()
    listed: bool = False
    format: str | None = None
    part: tuple[float, float] | None = None
    base: str | None = None
    same: str | None = None

    def missing(self) -> str | None:
        """What is not there, in words; None where everything is."""
        name = self.same or self.name
        if not self.paths:
            what = "DIRECTORY" if self.kind.is_model else "FILE"
            return f"sources.{name}.path is not given; add --set sources.{name}.path={what}"
        gone = [str(path) for path in self.paths if not path.exists()]
        if not gone and self.kind.is_model and not self.paths[0].is_dir():
            return f"sources.{name}.path: {self.paths[0]} is no directory, as a model is"
        return f"sources.{name}.path: there is no file {', '.join(gone)}" if gone else None


@dataclass(frozen=True)
class Row:
    """One step of the plan, checked. `code` maps the files whose text decides its result to their sha256."""

    name: str
    stage: str
    target: str
    cls: type[Stage]
    config: Settings
    inputs: dict[str, Ref | list[Ref] | None]
    seed: int
    code: dict[str, str] = field(default_factory=dict)

    def refs(self) -> list[Ref]:
        flat: list[Ref] = []
        for value in self.inputs.values():
            flat += value if isinstance(value, list) else [value] if value else []
        return flat


@dataclass(frozen=True)
class Plan:
    path: Path
    name: str
    seed: int
    launch: dict[str, Any]
    skip_bad: bool
    rows: list[Row]
    sources: dict[str, Source]
    document: dict[str, Any]  # as resolved: extends merged, --set applied

    def row(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise UserError(f"{self.path}: no row {name!r}{nearest(name, [row.name for row in self.rows])}")


@dataclass(frozen=True)
class RowState:
    """`fresh`: sealed, nothing to do. `stale`: must run. `pending`: its inputs are not there yet."""

    row: str
    status: Literal["fresh", "stale", "pending"]
    fingerprint: str | None
    why: str
    waits_for: str | None = None


def load_plan(plan: Path | str | Document, sets: Sequence[str], stages: Mapping[str, str]) -> Plan:
    """Read, merge and check a plan, or check one that was read. `stages` maps stage names to "module:Class".

    Raises UserError for the first thing that cannot be right: with file and line, what was expected and what
    mends it.
    """
    from .wiring import load

    return load(plan if isinstance(plan, Document) else load_document(Path(plan)), sets, stages)


# ------------------------------------------------------------------------------------- fingerprints, survey


def check_sources(plan: Plan) -> None:
    """UserError where a row reads a file that is not there."""
    used = {ref.source for row in plan.rows for ref in row.refs()}
    used |= {plan.sources[name].base for name in used if name}
    missing = [words for name in plan.sources if name in used and (words := plan.sources[name].missing())]
    if missing:
        raise UserError("\n".join(dict.fromkeys(missing)))


def survey(plan: Plan, store: Store, accept_code: bool = False) -> list[RowState]:
    """The state of every row, from top to bottom. Damaged where a row that counts as fresh is not intact."""
    states, known = [], {}  # type: list[RowState], dict[str, str]
    for row in plan.rows:
        state = state_of(plan, row, store, known, accept_code)
        states.append(state)
        if state.status == "fresh" and state.fingerprint is not None:
            known[row.name] = state.fingerprint
    store.remember()
    return states


def state_of(
    plan: Plan, row: Row, store: Store, known: Mapping[str, str] | None = None, accept_code: bool = False
) -> RowState:
    """The state of one row. `known` maps the sealed rows above to their fingerprints (default: surveyed).

    accept_code: a sealed row that differs in code alone counts as this row, and its fingerprint is returned.
    Raises UserError where two inputs that must share a tokenizer do not, Damaged where a sealed file changed.
    """
    inputs, waiting = _open_inputs(plan, row, store, _known(plan, row, store, known, accept_code))
    if waiting is not None:
        return waiting
    _check_tokenizers(row, inputs)
    identity = identity_of(plan, row, inputs)
    fingerprint = fingerprint_of(identity)
    if store.is_sealed(fingerprint):
        store.check(fingerprint)
        return RowState(row.name, "fresh", fingerprint, _sealed(plan, row, store.manifest(fingerprint)))
    if "skip_bad" in identity:  # a row that was sealed without it had no bad row to skip
        strict = fingerprint_of({key: value for key, value in identity.items() if key != "skip_bad"})
        if store.is_sealed(strict):
            store.check(strict)
            return RowState(row.name, "fresh", strict, "sealed, and no row of its files was bad")
    earlier = {fp: m for fp, m in store.manifests().items() if m["stage"] == row.stage}
    if accept_code:
        for fp, manifest in reversed(earlier.items()):
            if {**manifest["identity"], "code": identity["code"]} == identity:
                store.check(fp)
                words = "; ".join(differences(manifest["identity"], identity))
                return RowState(row.name, "fresh", fp, f"{words}: accepted as unchanged")
    why = store.left(fingerprint) or _why([m["identity"] for m in earlier.values() if m["row"] == row.name], identity)
    return RowState(row.name, "stale", fingerprint, why)


def _sealed(plan: Plan, row: Row, manifest: Mapping[str, Any]) -> str:
    """Launch settings are no part of identity: said where the row was shared otherwise than the plan says now."""
    from .launch import launch_settings, sharing_of, sharing_then

    before, now = sharing_then(manifest["environment"]), sharing_of(row.cls, launch_settings(plan.launch))
    return "sealed" if before == now else f"sealed with {before}, reused: launch settings are no part of its identity"


def request(plan: Plan, row: Row, store: Store, known: Mapping[str, str] | None = None) -> Request:
    """Everything that the worker of a row receives. UserError where an input is not there yet."""
    inputs, waiting = _open_inputs(plan, row, store, _known(plan, row, store, known, False))
    if waiting is not None:
        raise UserError(f"row {row.name} cannot run: {waiting.why}")
    _check_tokenizers(row, inputs)
    identity = identity_of(plan, row, inputs)
    fingerprint = fingerprint_of(identity)
    opened = [artifact for _, artifact in _pairs(row, inputs)]
    store.remember()
    return Request(
        row=row.name,
        stage=row.stage,
        target=row.target,
        fingerprint=fingerprint,
        config=row.config.model_dump(mode="json"),
        inputs={slot: _entries(row.inputs[slot], value) for slot, value in inputs.items()},
        identity=identity,
        seed=row.seed,
        partial=str(store.partial_dir(fingerprint)),
        launch=plan.launch,
        skip_bad=plan.skip_bad,
        places=_places(plan, row, inputs, store),
        roots=sorted({root for artifact in opened for root in artifact.meta.get("roots", [artifact.digest])}),
        plan=plan.name,
    )


Opened = dict[str, Artifact | list[Artifact] | None]


def identity_of(plan: Plan, row: Row, inputs: Opened) -> dict[str, Any]:
    """What decides the result of a row. In a list input the names count too: they label what comes out."""
    identity: dict[str, Any] = {
        "schema": SCHEMA,
        "stage": row.stage,
        "version": row.cls.version,
        "code": row.code,
        "settings": row.config.identity(),
        "inputs": {},
        "seed": row.seed,
    }
    for slot, value in inputs.items():
        refs = row.inputs[slot]
        if isinstance(value, list) and isinstance(refs, list):
            identity["inputs"][slot] = [[ref.text, a.digest] for ref, a in zip(refs, value, strict=True)]
        elif isinstance(value, Artifact):
            identity["inputs"][slot] = value.digest
    pairs = _pairs(row, inputs)
    formats = {ref.text: artifact.format for ref, artifact in pairs if artifact.format}
    if formats:
        identity["formats"] = formats
    parts = {ref.text: list(artifact.part) for ref, artifact in pairs if artifact.part}
    if parts:
        identity["parts"] = parts
    if plan.skip_bad and any(ref.source for ref, _ in pairs):
        identity["skip_bad"] = True
    return identity


def fingerprint_of(identity: Mapping[str, Any]) -> str:
    return sha256_bytes(canonical(identity))


def _known(plan: Plan, row: Row, store: Store, known: Mapping[str, str] | None, accept_code: bool) -> Mapping[str, str]:
    """Fingerprints of the rows that this one reads, surveyed where they are not given."""
    if known is not None:
        return known
    found: dict[str, str] = {}
    for above in plan.rows[: plan.rows.index(row)]:
        state = state_of(plan, above, store, found, accept_code)
        if state.status == "fresh" and state.fingerprint is not None:
            found[above.name] = state.fingerprint
    return found


def _open_inputs(plan: Plan, row: Row, store: Store, known: Mapping[str, str]) -> tuple[Opened, RowState | None]:
    """The artifacts of every slot, or the state of a row that has to wait for one."""
    for ref in row.refs():
        if ref.row and not store.is_sealed(known.get(ref.row, "-")):
            return {}, RowState(row.name, "pending", None, f"waits for {ref.row}", ref.row)
        missing = plan.sources[ref.source].missing() if ref.source else None
        if missing:
            return {}, RowState(row.name, "pending", None, missing, f"sources.{ref.source}")

    def opened(ref: Ref) -> Artifact:
        return store.open_output(known[ref.row], ref.slot or "") if ref.row else open_source(plan, ref.text, store)

    inputs: Opened = {}
    for slot, value in row.inputs.items():
        several = [opened(ref) for ref in value] if isinstance(value, list) else None
        inputs[slot] = opened(value) if isinstance(value, Ref) else several
    return inputs, None


def open_source(plan: Plan, name: str, store: Store) -> Artifact:
    """The files of a source as an artifact, and of the base that it names."""
    source = plan.sources[name]
    if words := source.missing():
        raise UserError(words)
    base = open_source(plan, source.base, store) if source.base else None
    return store.open_source(
        source.kind,
        source.paths,
        listed=source.listed,
        format=source.format,
        part=source.part,
        base=base,
        label=f"sources.{name}",
    )


def _pairs(row: Row, inputs: Opened) -> list[tuple[Ref, Artifact]]:
    artifacts: list[Artifact] = []
    for value in inputs.values():
        artifacts += value if isinstance(value, list) else [value] if value else []
    return list(zip(row.refs(), artifacts, strict=True))


def _entries(refs: Ref | list[Ref] | None, value: Artifact | list[Artifact] | None) -> Any:
    if isinstance(value, list) and isinstance(refs, list):
        return [_entries(ref, artifact) for ref, artifact in zip(refs, value, strict=True)]
    if not isinstance(value, Artifact) or not isinstance(refs, Ref):
        return None
    entry = value.entry()
    entry["meta"] |= {"ref": refs.text, "row": refs.row or refs.text}
    return entry


def _places(plan: Plan, row: Row, inputs: Opened, store: Store) -> dict[str, list[str]]:
    """Where the user's files lie that this row reads, directly or as the base of an adapter."""
    places: dict[str, list[str]] = {}
    for ref, artifact in _pairs(row, inputs):
        if ref.source:
            places[artifact.digest] = [str(path) for path in plan.sources[ref.source].paths]
        for digest, path in artifact.bases.items():
            if store.find_output(digest) is None:
                places[digest] = [str(path)]
    return places


def _check_tokenizers(row: Row, inputs: Opened) -> None:
    """Where ids or weights cross between inputs, they must mean the same: refuse the row, naming both."""
    pairs = {id(artifact): ref.text for ref, artifact in _pairs(row, inputs)}
    for group in row.cls.boundaries(row.config):
        members: list[Artifact] = []
        for slot in group:
            value = inputs.get(slot.removesuffix(FIRST))
            several = value if isinstance(value, list) else [value] if value else []
            members += several[:1] if slot.endswith(FIRST) else several
        for fact in ("tokenizer", "template"):
            carrying = [artifact for artifact in members if artifact.lineage.get(fact)]
            for other in carrying[1:]:
                one, two = carrying[0].lineage[fact], other.lineage[fact]
                if one != two:
                    both = f"{pairs[id(carrying[0])]} and {pairs[id(other)]}"
                    raise UserError(
                        f"row {row.name}: {both} must have the same {fact}, "
                        f"because ids or weights cross between them, but theirs are {one} and {two}; "
                        "train both from one model"
                    )


# ---------------------------------------------------------------------------------------------- differences


def _why(earlier: Sequence[Mapping[str, Any]], identity: Mapping[str, Any]) -> str:
    """The difference to the earlier row that is most like this one; of two alike the newer.

    A row that differs in every input and in more than its inputs is another chain's, not an earlier version.
    """
    akin = [old for old in earlier if _akin(old, identity)]
    if not akin:
        return "never run on these inputs" if earlier else "never run"
    words = min((differences(old, identity) for old in reversed(akin)), key=len)
    more = f"; and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return "; ".join(words[:SHOWN]) + more


def _akin(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    inputs = {slot: value for slot, value in new["inputs"].items() if value}
    shared = any(old["inputs"].get(slot) == value for slot, value in inputs.items())
    return shared or not inputs or {**old, "inputs": None} == {**new, "inputs": None}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two identities: "settings.beta 0.1 -> 0.2", "input comparisons changed"."""
    words = [
        f"{name} {old.get(key)} -> {new.get(key)}"
        for key, name in (
            ("stage", "stage"),
            ("version", "stage version"),
            ("seed", "seed"),
            ("schema", "schema"),
        )
        if old.get(key) != new.get(key)
    ]
    before, after = _leaves(old["settings"]), _leaves(new["settings"])
    for key in sorted({*before, *after}):
        if before.get(key, "unset") != after.get(key, "unset"):
            words.append(f"settings.{key} {_short(before.get(key, 'unset'))} -> {_short(after.get(key, 'unset'))}")
    words += [f"input {slot} {verb}" for slot, verb in _changed(old["inputs"], new["inputs"])]
    formats = old.get("formats", {}), new.get("formats", {})
    words += [f"format of {source} {verb}" for source, verb in _changed(*formats)]
    parts = old.get("parts", {}), new.get("parts", {})
    words += [f"part of {source} {verb}" for source, verb in _changed(*parts)]
    if old.get("skip_bad") != new.get("skip_bad"):
        words.append(f"skip_bad {old.get('skip_bad', False)} -> {new.get('skip_bad', False)}")
    return words + [f"code of {file} {verb}" for file, verb in _changed(old["code"], new["code"])]


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str]]:
    verbs = {(True, True): "changed", (True, False): "removed", (False, True): "added"}
    return [(k, verbs[k in old, k in new]) for k in sorted({*old, *new}) if old.get(k) != new.get(k)]


def _leaves(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            leaves.update(_leaves(item, f"{prefix}{key}."))
        else:
            leaves[prefix + key] = item
    return leaves


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
