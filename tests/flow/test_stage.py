"""Wiring from annotations, and a row run in this process."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.flow.artifacts import Comparisons, Documents, Policy, RewardModel, describe
from pipeline.flow.config import Settings
from pipeline.flow.errors import UserError
from pipeline.flow.stage import (
    OneOrMore,
    Request,
    Stage,
    Workspace,
    jsonable,
    outputs_of,
    run_stage,
    slots_in,
    slots_out,
)


class Upper(Stage):
    """Writes its documents in capitals."""

    name = "upper"
    version = 2

    class Config(Settings):
        suffix: str = "!"
        write: bool = True

    @dataclass
    class Inputs:
        documents: Documents
        extra: Comparisons | None = None
        models: list[Policy | RewardModel] = field(default_factory=list)

    @dataclass
    class Outputs:
        documents: Documents
        notes: Documents | None = None

    def run(self, inputs: Inputs, workspace: Workspace) -> dict[str, Any]:
        text = "".join(path.read_text() for path in inputs.documents.data_files).upper() + self.config.suffix
        if self.config.write:
            (workspace.slot("documents") / "data.jsonl").write_text(text)
        workspace.lineage("documents", letters=len(text))
        workspace.log(step=1, loss=0.5, bad=float("nan"))
        workspace.progress(1, 2, loss=0.5)
        workspace.say("done")
        assert inputs.extra is None and inputs.models == []
        return {"letters": len(text), "nothing": float("inf")}


def _request(tmp_path: Path, **changes: Any) -> Request:
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    (source / "data.jsonl").write_text("a\n")
    meta = describe(source, "documents")
    documents = Documents(source, ("data.jsonl",), meta["digest"], meta=meta).entry()
    (tmp_path / "partial").mkdir(exist_ok=True)
    values: dict[str, Any] = {
        "row": "upper@2",
        "stage": "upper",
        "target": f"{__name__}:Upper",
        "fingerprint": "f" * 64,
        "config": {},
        "inputs": {"documents": documents, "extra": None, "models": None},
        "identity": {"stage": "upper"},
        "seed": 7,
        "partial": str(tmp_path / "partial"),
    }
    return Request(**{**values, **changes})


def test_slots_are_read_from_annotations() -> None:
    slots = slots_in(Upper)
    assert [(s.name, s.many, s.optional) for s in slots.values()] == [
        ("documents", False, False),
        ("extra", False, True),
        ("models", True, True),
    ]
    assert slots["models"].kinds == (Policy, RewardModel)
    assert slots["models"].expects == "a list of Policy or RewardModel"
    assert slots_out(Upper)["notes"].optional


def test_one_or_more_is_a_list_that_takes_one() -> None:
    class Scored(Stage):
        @dataclass
        class Inputs:
            reward: OneOrMore[RewardModel]
            others: OneOrMore[Policy] = field(default_factory=list)

    slots = slots_in(Scored)
    assert [(s.many, s.optional, s.one_will_do) for s in slots.values()] == [(True, False, True), (True, True, True)]
    assert slots["reward"].kinds == (RewardModel,) and slots["reward"].expects == "one RewardModel or a list"
    assert not slots_in(Upper)["models"].one_will_do


def test_annotations_that_are_no_artifacts_are_an_error_of_the_stage() -> None:
    class Odd(Stage):
        @dataclass
        class Inputs:
            count: int

        @dataclass
        class Outputs:
            pass

    with pytest.raises(TypeError, match=r"Odd\.Inputs\.count"):
        slots_in(Odd)


def test_a_request_is_json(tmp_path: Path) -> None:
    request = _request(tmp_path)
    request.write(tmp_path / "request.json")
    assert Request.read(tmp_path / "request.json") == request
    assert request.input_digests()["extra"] is None


def test_a_row_becomes_a_manifest(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    manifest = run_stage(_request(tmp_path), events.append)
    assert manifest is not None
    output = manifest["outputs"]["documents"]
    assert (tmp_path / "partial/out/documents/data.jsonl").read_text() == "A\n!"
    assert output["files"]["data.jsonl"]["bytes"] == 3
    assert output["lineage"] == {"letters": 3}
    assert "notes" not in manifest["outputs"]
    assert manifest["metrics"] == {"letters": 3, "nothing": None}
    assert manifest["settings"] == {"suffix": "!", "write": True}
    assert (manifest["row"], manifest["version"], manifest["seed"]) == ("upper@2", 2, 7)
    assert manifest["environment"]["world"] == 1
    assert [event["event"] for event in events] == ["metrics", "progress", "said"]
    line = json.loads((tmp_path / "partial/metrics.jsonl").read_text())
    assert (line["step"], line["loss"], line["bad"]) == (1, 0.5, None)
    json.dumps(manifest, allow_nan=False)


def test_a_stage_that_writes_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wrote no file for its output 'documents'"):
        run_stage(_request(tmp_path, config={"write": False}), lambda event: None)


def test_other_ranks_write_no_metrics_and_return_nothing(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    assert run_stage(_request(tmp_path), events.append, rank=1, world=2) is None
    assert events == []
    assert not (tmp_path / "partial/metrics.jsonl").exists()


def test_jsonable() -> None:
    class Scalar:
        def item(self) -> float:
            return 1.5

    assert jsonable({"a": Scalar(), "b": (1, float("nan")), 3: None}) == {"a": 1.5, "b": [1, None], "3": None}
    with pytest.raises(TypeError, match="set"):
        jsonable({1})


def test_an_adapter_that_names_its_base_by_path_is_an_error_of_the_stage(tmp_path: Path) -> None:
    class Lora(Stage):
        @dataclass
        class Inputs:
            pass

        @dataclass
        class Outputs:
            policy: Policy

    (tmp_path / "policy").mkdir()
    config = tmp_path / "policy/adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": "somewhere/model"}))
    with pytest.raises(ValueError, match="by digest"):
        outputs_of(Lora, tmp_path, {})
    config.write_text(json.dumps({"base_model_name_or_path": "a" * 64}))
    assert outputs_of(Lora, tmp_path, {})["policy"]["lineage"] == {"form": "adapter", "base": "a" * 64}
