"""Plans with one thing wrong: each is one message that names the key, before anything heavy is imported.

A mutation is a text below `extends: [quickstart.yaml]`, and the words that the message must hold. Dotted keys stand for
nested mappings.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAMPLE_CODE = """
import sys
from pipeline.cli import main
try:
    main(sys.argv[1:])
finally:
    assert not {"torch", "transformers"} & set(sys.modules)
"""


def setting(key: str, value: str) -> str:
    """
    >>> setting("dpo.loss.beta", "0.1"), setting("launch.processes", "2")
    ('stages: {dpo: {loss: {beta: 0.1}}}', 'launch: {processes: 2}')
    """
    keys = key.split(".")
    keys = keys if keys[0] in ("launch", "sources") else ["stages", *keys]
    return f"{keys[0]}: " + "".join(f"{{{k}: " for k in keys[1:]) + value + "}" * (len(keys) - 1)


KEYS = """
pretrain.vocab_size pretrain.mixture.weights pretrain.clean.similarity pretrain.train.skip_spikes
pretrain.train.batch_growth pretrain.model.hidden_size pretrain.model.rope_theta pretrain.train.learning_rate
sft.train_on sft.max_tokens sft.adapter.targets sft.train.batch_tokens sft.train.weight_decay reward.weight_by
reward.centring reward.normalise_prompts reward.train.precision ppo.iterations ppo.advantage ppo.clip_high ppo.dual_clip
ppo.value_coefficient ppo.kl.coefficient ppo.kl.estimator ppo.critic.warmup ppo.reference.kind ppo.mix.pretraining
ppo.importance.correct ppo.sampling.temperature ppo.sampling.max_new_tokens ppo.engine.precision ppo.reward.combine
ppo.reward.unfinished_score ppo.train.schedule rejection.temperatures rejection.choose.fraction rejection.pairs.margin
rejection.token_budget rejection.train.evaluations dpo.kl_budget dpo.train.keep_last evaluate.samples
evaluate.token_budget launch.processes launch.strategy launch.zero_stage sources.world.documents
sources.world.length_bias
"""
POSITIVE = """
pretrain.clean.similarity pretrain.train.skip_spikes pretrain.train.spike_window pretrain.train.cooldown
pretrain.vocab_size pretrain.model.num_hidden_layers pretrain.model.rms_norm_eps pretrain.train.batch sft.max_tokens
sft.adapter.rank sft.train.learning_rate sft.train.epochs sft.train.eps reward.normalise_prompts
reward.train.token_budget ppo.iterations ppo.prompts ppo.minibatch ppo.epochs ppo.clip ppo.kl.target ppo.kl.horizon
ppo.sampling.samples ppo.sampling.top_p ppo.train.keep_last rejection.token_budget rejection.choose.fraction
rejection.pairs.per_prompt dpo.max_new_tokens dpo.loss.beta evaluate.samples evaluate.token_budget launch.processes
launch.threads sources.world.comparisons
"""
NOT_NEGATIVE = """
pretrain.train.weight_decay pretrain.train.warmup sft.train.clip sft.adapter.dropout reward.centring ppo.gamma ppo.lam
ppo.kl.coefficient ppo.mix.sft ppo.critic.warmup ppo.entropy_coefficient ppo.sampling.temperature
rejection.reward.unfinished_penalty rejection.round rejection.pairs.margin dpo.loss.label_smoothing
evaluate.temperature evaluate.best_of sources.world.seed
"""
SWITCHES = (
    "sft.train.checkpointing",
    "ppo.divide",
    "ppo.reward.whiten",
    "launch.preload",
    "ppo.sampling.early_stopping",
)
ROW = "rows: [{pretrain: {documents: world.documents}}, "


def misspelt(key: str) -> str:
    """
    >>> misspelt("launch.processes")
    'launch.procsses'
    """
    above, _, last = key.rpartition(".")
    return f"{above}.{last[: len(last) // 2]}{last[len(last) // 2 + 1 :]}"


MUTATIONS: list[tuple[str, tuple[str, ...]]] = [
    *(
        (setting(misspelt(k), "1"), (misspelt(k).rpartition(".")[2], f"did you mean {k.rpartition('.')[2]!r}"))
        for k in KEYS.split()
    ),
    *((setting(key, bad), (key,)) for key in POSITIVE.split() for bad in ("-1", "0", ".nan", "true")),
    *((setting(key, bad), (key,)) for key in NOT_NEGATIVE.split() for bad in ("-0.5", ".inf", "[1]")),
    *((setting(key, bad), (key,)) for key in SWITCHES for bad in ("1", "'off'", "[true]")),
    # what a plan is made of
    ("stage: {}", ("unknown key 'stage'", "did you mean 'stages'?")),
    ("source: {}", ("unknown key 'source'", "did you mean 'sources'?")),
    ("lanch: {}", ("unknown key 'lanch'", "did you mean 'launch'?")),
    ("seed: -1", ("seed: expected a number from 0",)),
    ("seed: 1.5", ("seed: expected int, found 1.5",)),
    ("seed: true", ("seed: expected int",)),
    ("seed: 0x" + "f" * 399, ("a number of 401 digits",)),
    ("seed: 9223372036854775808", ("seed: expected a number from 0 to 9223372036854775807",)),
    ("skip_bad: 1", ("skip_bad: expected bool",)),
    ("launch: 2", ("launch",)),
    ("stages: [dpo]", ("stages: expected a mapping",)),
    ("stages: {dop: {beta: 1}}", ("stages.dop", "did you mean 'dpo'?")),
    ("settings: {dpo@2: {beta: 1}}", ("settings.dpo@2: there is no such row", "did you mean 'dpo'?")),
    ("settings: {dpo: 3}", ("settings.dpo: expected a mapping",)),
    ("settings: {evaluate@t07: {temprature: 1}}", ("temprature", "did you mean 'temperature'?")),
    # keys that stand twice
    ("seed: 1\nseed: 2", (":3: the key 'seed' stands twice (first in line 2)",)),
    ("stages: {dpo: {beta: 0.1, beta: 0.2}}", ("the key 'beta' stands twice",)),
    ("stages:\n  dpo: {}\n  sft: {}\n  dpo: {}", (":5: the key 'dpo' stands twice",)),
    ("sources: {world: {kind: world, kind: world}}", ("the key 'kind' stands twice",)),
    ("launch: {processes: 1, 'processes': 2}", ("the key 'processes' stands twice",)),
    # YAML that is none of ours
    ("stages: &a {dpo: {}}", ("anchors and aliases are not read",)),
    ("stages: {dpo: !!python/name:os.system x}", ("the tag", "is not read")),
    ("stages: {<<: {dpo: {}}}", ("stages.<<: no such stage",)),
    ("stages: {dpo: {beta: 0.1}", (":3: expected",)),
    ("stages: " + "{dpo: " * 99, ("nested too deeply",)),
    # words that are none, with those that are
    (setting("sft.train_on", "everything"), ("sft.train_on", "'all_rounds'", "'last_round'")),
    (setting("sft.train.precision", "fp16"), ("sft.train.precision", "'fp32', 'bf16' or 'auto'")),
    (setting("sft.train.schedule", "cosin"), ("sft.train.schedule", "'cosine'", "'wsd'")),
    (setting("pretrain.objective", "fmi"), ("pretrain.objective", "'fmi'", "'fim'")),
    (setting("pretrain.objective", "{name: spans, densty: 1}"), ("unknown key 'densty'", "did you mean 'density'?")),
    (setting("pretrain.clean.duplicates", "all"), ("pretrain.clean.duplicates", "'exact' or 'near'")),
    (setting("sft.adapter.targets", "all"), ("sft.adapter.targets", "'attention'")),
    (setting("pretrain.model.preset", "llama-3-8"), ("preset 'llama-3-8' is not known", "did you mean 'llama-3-8b'?")),
    (setting("pretrain.model", "milion"), ("preset 'milion' is not known", "did you mean 'million'?")),
    (setting("ppo.advantage", "rlo"), ("ppo.advantage", "'rloo'")),
    (setting("ppo.kl.where", "los"), ("ppo.kl.where", "'reward' or 'loss'")),
    (setting("ppo.engine.engine", "sglang"), ("ppo.engine.engine", "'vllm'")),
    (setting("rejection.choose.by", "worst"), ("rejection.choose.by", "'best'")),
    (setting("rejection.pairs.by", "best_second"), ("rejection.pairs.by", "'best_worst'")),
    (setting("dpo.loss", "{name: sompi}"), ("dpo.loss", "sompi", "'simpo'")),
    (setting("launch.strategy", "dpp"), ("launch.strategy", "'ddp'")),
    (setting("launch.zero_stage", "4"), ("launch.zero_stage", "1, 2 or 3")),
    (
        setting("launch.deepspeed", "{zero_optimization: {a: [.nan]}}"),
        ("launch.deepspeed.zero_optimization.a.0", "nan"),
    ),
    (setting("ppo.reward.functions", "[{call: a.b, arguments: {x: 1e999}}]"), ("arguments.x", "inf")),
    (setting("launch.device", "gpu"), ("launch.device", "'cuda'")),
    # values of another type, or beyond their bounds
    (setting("sft.train", "[1]"), ("sft.train",)),
    (setting("sft.train.betas", "[0.9]"), ("sft.train.betas",)),
    (setting("sft.train.betas", "[0.9, 1.0]"), ("betas: both must be in [0, 1)",)),
    (setting("sft.train.betas", "[0.9, .nan]"), ("sft.train.betas",)),
    (setting("sft.train.steps", "1000000000000"), ("sft.train.steps",)),
    (setting("sft.train.batch", "1.5"), ("sft.train.batch",)),
    (setting("pretrain.model.num_hidden_layers", "1000000000"), ("num_hidden_layers", "less than or equal to 1024")),
    (setting("pretrain.vocab_size", "1000000000000"), ("pretrain.vocab_size",)),
    (setting("ppo.reward.weights", "{reward: .nan}"), ("ppo.reward.weights.reward",)),
    (setting("ppo.reward.functions", "{call: x.y}"), ("ppo.reward.functions",)),
    (setting("ppo.reward.functions", "[{call: os.system}]"), ("os.system", "does not allow")),
    (setting("ppo.reward.modules", "[no_such_module]"), ("no module 'no_such_module'",)),
    (setting("ppo.reward.functions", "[{call: pipeline.rollout.checks.exact_mach}]"), ("did you mean 'exact_match'?",)),
    (setting("rejection.temperatures", "[0.7, -1]"), ("temperatures",)),
    (setting("rejection.temperatures", "[0.7, 0.7]"), ("temperatures",)),
    (setting("reward.part", "[0.5, 0.2]"), ("reward.part",)),
    (setting("sources.world.kind", "word"), ("sources.world.kind", "did you mean 'world'?")),
    # pairs that do not go together
    (setting("dpo", "{beta: 0.2, loss: {beta: 0.1}}"), ("beta and loss.beta are the same setting",)),
    (setting("dpo", "{loss: {name: simpo, label_smoothing: 0.1}}"), ("the loss simpo has no label_smoothing",)),
    (
        setting("dpo", "{sft_coefficient: null, loss: {name: kto, sft_coefficient: 1}}"),
        ("the loss kto has no sft_coefficient",),
    ),
    (setting("dpo.kl_budget", "1"), ("dpo.kl_budget", "`dev`")),
    (setting("ppo.kl_budget", "1"), ("ppo.kl_budget", "`dev`")),
    (setting("rejection.kl_budget", "1"), ("rejection.kl_budget", "`dev`")),
    (setting("launch.processes", "2"), ("launch.processes: 2, but launch.strategy is single",)),
    (setting("ppo.kl.band", "[9, 4]"), ("band", "the lower first")),
    (setting("ppo.sampling.top_k", "5"), ("ppo.sampling", "ppo.importance.correct")),
    (setting("ppo.sampling.temperature", "0"), ("ppo.sampling.temperature: 0",)),
    (setting("ppo", "{advantage: rloo, sampling: {samples: 1}}"), ("ppo.advantage: rloo", "samples to 2 or more")),
    (setting("ppo.mix.sft", "0.5"), ("ppo.mix.sft", "'conversations'")),
    (setting("ppo.mix.pretraining", "0.5"), ("ppo.mix.pretraining", "'documents'")),
    (setting("ppo.sampling", "{min_new_tokens: 48}"), ("min_new_tokens 48", "max_new_tokens")),
    (
        setting("ppo.reward", "{unfinished_score: -1, unfinished_penalty: 1}"),
        ("unfinished_score", "unfinished_penalty"),
    ),
    (setting("ppo.reward.overlong", "{budget: 4, buffer: 8}"), ("buffer 8 is longer than budget 4",)),
    (setting("ppo.reward.weights", "{rewart: 2.0}"), ("ppo.reward.weights", "did you mean 'reward'?")),
    (setting("rejection.reward.weights", "{rewart: 2.0}"), ("rejection.reward.weights", "did you mean 'reward'?")),
    (setting("rejection.sampling.num_beams", "2"), ("num_beams 2", "temperature 0")),
    (setting("rejection.choose.by", "threshold"), ("give threshold a number",)),
    (setting("rejection.train", "null"), ("policy is left out by the settings of row rejection",)),
    (setting("pretrain.model.hidden_size", "130"), ("hidden_size 130 is no multiple of num_attention_heads 4",)),
    (setting("pretrain.model.num_key_value_heads", "3"), ("num_attention_heads 4 is no multiple",)),
    # rows and what they read
    ("rows: []", ("rows: expected a list of rows",)),
    ("rows: {sft: {}}", ("rows: expected a list of rows",)),
    (ROW + "{pretrian: {}}]", ("row 'pretrian': there is no stage", "did you mean 'pretrain'?")),
    (ROW + "{pretrain: {}}]", ("row 'pretrain' stands twice",)),
    (ROW + "{Sft: {}}]", ("row 'Sft': a row is called",)),
    (ROW + "{sft: {}, dpo: {}}]", ("row 2: expected one",)),
    (ROW + "{sft: {policy: pretrain.policy}}]", ("row sft, input conversations", "nothing is given")),
    (ROW + "{sft: {polcy: x}}]", ("row sft: there is no input 'polcy'", "did you mean 'policy'?")),
    (
        ROW + "{sft: {policy: pretrain.polcy, conversations: world.conversations}}]",
        ("did you mean 'pretrain.policy'?",),
    ),
    (ROW + "{sft: {policy: world.documents, conversations: world.conversations}}]", ("world.documents is Documents",)),
    (
        ROW + "{sft: {policy: dpo.policy, conversations: world.conversations}}]",
        ("nothing above is called 'dpo.policy'",),
    ),
    (ROW + "{sft: {policy: 5, conversations: world.conversations}}]", ("row sft, input policy", "5")),
    (ROW + "{ppo: {policy: pretrain.policy, prompts: world.prompts}}]", ("ppo: nothing rewards an answer",)),
    (
        ROW + "{rejection: {policy: pretrain.policy}}]",
        ("row rejection: input prompts: nothing to draw answers for",),
    ),
    # files of the user
    ("sources: {pairs: {kind: comparison, path: x}}", ("sources.pairs.kind", "did you mean 'comparisons'?")),
    ("sources: {pairs: {path: x}}", ("sources.pairs: no kind is given",)),
    ("sources: {pairs: {kind: comparisons, pth: x}}", ("sources.pairs", "unknown key 'pth'", "did you mean 'path'?")),
    ("sources: {pairs: {kind: comparisons, path: 5}}", ("sources.pairs.path",)),
    ("sources: {pairs: {kind: comparisons, path: x, part: [0.9, 0.1]}}", ("sources.pairs.part",)),
    ("sources: {pairs: {kind: comparisons, path: x, part: [0, .nan]}}", ("sources.pairs.part",)),
    ("sources: {pairs: {kind: comparisons, same: paris}}", ("no source of files is called 'paris'",)),
    ("sources: {base: {kind: policy, path: x, base: bas}}", ("no source is called 'bas'", "did you mean 'base'?")),
    ("sources: {base: {kind: policy, path: x, base: base}}", ("a model cannot be its own base",)),
    ("sources: {Pairs: {kind: comparisons, path: x}}", ("a source is called",)),
    ("sources: 7", ("sources: expected a mapping",)),
    ("stages: {sft: {train: {hub_token: hf_abcdefghijklmnop}}}", ("stages.sft.train.hub_token", "token or a password")),
]


def write_mutation(folder: Path, text: str) -> Path:
    """quickstart.yaml with a mutation; rows of its own leave out the settings of rows that it has not."""
    path = folder / "mutated.yaml"
    text += "\nsettings: {evaluate@t07: null}" if text.startswith(ROW) else ""
    path.write_text(f"extends: [{ROOT / 'configs' / 'quickstart.yaml'}]\n{text}\n")
    return path


def test_there_are_enough() -> None:
    assert len({text for text, _ in MUTATIONS}) == len(MUTATIONS) >= 100


@pytest.fixture
def place(cli: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command line with the real stages, not the toys."""
    from pipeline.cli import plan, run

    table = {name: f"stages.{name}:{name.capitalize()}" for name in STAGE_NAMES}
    for module in (plan, run):
        monkeypatch.setattr(module, "stage_table", lambda: table)
    return cli


STAGE_NAMES = ("pretrain", "sft", "reward", "ppo", "rejection", "dpo", "evaluate")


def test_the_plan_itself_is_right(place: Any) -> None:
    assert place.json("plan", str(write_mutation(place.root, "seed: 1")))["rows"]


@pytest.mark.parametrize(("text", "told"), MUTATIONS, ids=lambda value: value[:60] if isinstance(value, str) else "")
def test_a_mutated_plan_is_refused_by_its_key(place: Any, text: str, told: tuple[str, ...]) -> None:
    code, out, err = place("plan", str(write_mutation(place.root, text)))
    assert (code, out) == (2, "") and err.startswith("rlhf: ") and "Traceback" not in err, err
    assert all(words in err for words in told), err


@pytest.mark.parametrize("text", [MUTATIONS[0][0], setting("dpo.beta", "-1"), setting("ppo.advantage", "rlo")])
def test_a_mutated_plan_is_refused_before_anything_heavy_is_imported(tmp_path: Path, text: str) -> None:
    command = [sys.executable, "-c", SAMPLE_CODE, "run", str(write_mutation(tmp_path, text))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 2 and ended.stderr.startswith("rlhf: "), ended.stderr
