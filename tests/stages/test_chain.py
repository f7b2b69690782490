"""The whole chain through the command line: what runs, what is reused, what is refused, what the numbers must be."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stages.conftest import Chain

ROWS = ["world", "pretrain", "sft", "reward", "ppo", "rejection", "dpo", "evaluate"]
POLICY_KEYS = {
    "proxy", "heldout", "gold", "gold_parts", "win_rate", "kl", "length", "stop_rate", "text_perplexity",
}  # fmt: skip


def metrics_log(chain, row: str) -> list[dict]:
    path = chain.directory / "runs" / "plan" / "metrics" / f"{row}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_row_is_executed_and_names_its_artifacts(first):
    assert list(first) == ROWS
    assert {row["status"] for row in first.values()} == {"executed"}
    assert set(first["rejection"]["artifacts"]) == {"policy", "samples", "conversations", "comparisons"}
    for row in first.values():
        for artifact in row["artifacts"].values():
            assert Path(artifact["path"]).is_dir() and len(artifact["digest"]) == 64


def test_evaluation_has_the_promised_shape(first):
    metrics = first["evaluate"]["metrics"]
    assert metrics["temperature"] == 1.0 and metrics["prompts"] == 20
    assert set(metrics["policies"]) == {"sft", "ppo", "dpo"}
    for name, policy in metrics["policies"].items():
        assert set(policy) >= POLICY_KEYS
        assert 0 <= policy["gold"] <= 1 and 0 <= policy["stop_rate"] <= 1
        assert policy["text_perplexity"] > 1
        assert set(policy["gold_parts"]) == {"correct", "complete", "mannered", "concise", "ended"}
        if name != "sft":
            rate = policy["win_rate"]
            assert rate["vs"] == "sft" and rate["low"] <= rate["mean"] <= rate["high"]
    assert metrics["policies"]["sft"]["kl"] == 0.0  # the reference against itself, exactly
    assert metrics["policies"]["sft"]["win_rate"] is None
    assert len(metrics["best_of_n"]["rows"]) == 4
    assert metrics["reward_model"]["labels"]["count"] > 0


def test_ppo_starts_exactly_at_its_reference(chain, first):
    log = metrics_log(chain, "ppo")
    assert len(log) == 2
    assert log[0]["kl"] == 0.0  # T37: the same weights on the same forests
    assert log[0]["first_ratio"] == log[1]["first_ratio"] == 1.0  # T32, every iteration
    assert log[1]["kl"] != 0.0
    assert first["ppo"]["metrics"]["updates"] == 2 * 2 * 2


def test_dpo_starts_at_ln_2(chain, first):
    log = metrics_log(chain, "dpo")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_reward_scores_are_normalised_and_proven(first):
    from pipeline.flow.artifacts import RewardModel
    from pipeline.rollout.reward import open_reward

    place = Path(first["reward"]["artifacts"]["model"]["path"])
    manifest = json.loads((place.parent / "manifest.json").read_text())
    lineage = manifest["outputs"]["model"]["lineage"]
    assert lineage["normalised_on"] == "samples of the policy"
    artifact = RewardModel(place, tuple(manifest["outputs"]["model"]["files"]), "0" * 64, lineage)
    reward = open_reward(artifact)  # reproduces probe.json
    assert reward.shift == pytest.approx(lineage["shift"])
    probe = json.loads((place / "probe.json").read_text())
    assert len(probe["scores"]) == sum(len(g) - 1 for g in probe["groups"]) > 0


def test_rejection_keeps_the_best_of_every_prompt(first):
    artifacts = first["rejection"]["artifacts"]

    def rows(slot: str) -> list[dict]:
        return [json.loads(line) for line in (Path(artifacts[slot]["path"]) / "data.jsonl").read_text().splitlines()]

    samples = rows("samples")
    assert len(samples) == 16 * 4
    best: dict[str, float] = {}
    for s in samples:
        if s["stopped"]:
            best[s["prompt"]["id"]] = max(best.get(s["prompt"]["id"], -1e9), s["scores"]["proxy"])
    for comparison in rows("comparisons"):
        first_score, second = (c["score"] for c in comparison["completions"])
        assert first_score > second
        assert first_score in best.values()


def test_the_best_of_n_curve_is_shown_as_a_table(chain, first):
    """Four answers to each prompt: n = 1 .. 4, ending in the mean of each prompt's highest score."""
    rows = first["rejection"]["metrics"]["best_of_n"]["rows"]
    done = chain.rlhf("show", "plan", "rejection")
    assert done.returncode == 0, done.stderr
    place = done.stdout.index("best of n samples of ppo")
    assert "by_reward" not in done.stdout[:place]  # the table instead of its raw figures
    last = [line for line in done.stdout[place:].splitlines() if line.startswith("│ 4 ")]
    assert len(last) == 1 and f"{rows[3]['reward']['mean']:.3f} [" in last[0] and "0.64" in last[0]
    assert json.loads(chain.rlhf("show", "plan", "rejection", "--json").stdout)["metrics"]["best_of_n"]["rows"] == rows


def test_same_plan_twice_executes_nothing_and_one_changed_byte_reruns_what_depends_on_it(chain, first):
    again = chain.run()
    assert {row["status"] for row in again.values()} == {"reused"}
    pairs = chain.directory / "pairs.jsonl"
    text = pairs.read_text()
    pairs.write_text(text.replace("Grass is green.", "Grass is Green.", 1))
    try:
        changed = chain.run("--name", "changed")
    finally:
        pairs.write_text(text)
    status = {name: row["status"] for name, row in changed.items()}
    assert [n for n in ROWS if status[n] == "reused"] == ["world", "pretrain", "sft"]
    assert [n for n in ROWS if status[n] == "executed"] == ["reward", "ppo", "rejection", "dpo", "evaluate"]


def test_another_place_and_environment_give_the_same_digests(chain, first, tmp_path):
    """Another directory, hash seed, home, time zone and language, and the environment in another order."""
    for name in ("plan.yaml", "pairs.jsonl"):
        (tmp_path / name).write_text((chain.directory / name).read_text())
    changed = {"PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo", "LANG": "C", "HOME": str(tmp_path), "SHUFFLED": "1"}
    env = dict(sorted((os.environ | changed).items(), key=lambda item: item[0][::-1]))
    done = Chain(tmp_path).rlhf("run", "plan.yaml", "--json", env=env)
    assert done.returncode == 0, done.stderr
    again = {row["row"]: row["artifacts"] for row in json.loads(done.stdout)["rows"]}
    digests = lambda artifacts: {slot: found["digest"] for slot, found in artifacts.items()}
    assert {row: digests(found) for row, found in again.items()} == {
        row: digests(found["artifacts"]) for row, found in first.items()
    }
    done = Chain(tmp_path).rlhf("verify", "plan")
    assert done.returncode == 0, done.stdout


def test_forced_rows_reproduce_their_bytes(chain, first):
    for row in ("sft", "dpo"):
        done = chain.rlhf("stage", "plan.yaml", row, "--force", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["same"] is True


def test_saved_models_open_without_this_project(chain, first):
    code = (
        "import sys; from transformers import AutoModelForCausalLM as C, AutoModelForSequenceClassification as S\n"
        "c = C.from_pretrained(sys.argv[1]); s = S.from_pretrained(sys.argv[2])\n"
        "assert type(c).__module__.startswith('transformers') and s.score.weight.shape[0] == 1\n"
        "assert not any(m.split('.')[0] in ('pipeline', 'stages') for m in sys.modules)\n"
    )
    places = [first["dpo"]["artifacts"]["policy"]["path"], first["reward"]["artifacts"]["model"]["path"]]
    done = subprocess.run(
        [sys.executable, "-c", code, *places], cwd=chain.directory, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr


def test_a_flipped_byte_in_stored_weights_is_refused_by_name(chain, first):
    weights = Path(first["sft"]["artifacts"]["policy"]["path"]) / "model.safetensors"
    body = bytearray(weights.read_bytes())
    mode = weights.stat().st_mode
    weights.chmod(0o644)
    body[-7] ^= 1
    weights.write_bytes(bytes(body))
    try:
        done = chain.rlhf("run", "plan.yaml")
    finally:
        body[-7] ^= 1
        weights.write_bytes(bytes(body))
        weights.chmod(mode)
    assert done.returncode == 3
    assert "model.safetensors" in done.stderr and "Traceback" not in done.stderr
