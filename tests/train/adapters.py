"""Six updates of SFT and of a reward model under adapters of every kind, saved, and what came out as JSON.

torchrun --nproc_per_node 2 tests/train/adapters.py OUT STRATEGY [ZERO_STAGE]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from pipeline.llama.adapter_settings import (  # noqa: E402
    AnyAdapter,
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
    WeightsSettings,
)
from pipeline.llama.open import open_trainable, open_trainable_classifier  # noqa: E402
from pipeline.llama.save import save_model  # noqa: E402
from pipeline.train.loop import Trainer  # noqa: E402
from pipeline.train.objectives import pairwise_ranking, weigh_pairs  # noqa: E402
from pipeline.train.settings import TrainSettings  # noqa: E402
from pipeline.train.strategy import Strategy, build  # noqa: E402
from tests.small import artifact, chat, policy, save  # noqa: E402
from tests.train.equivalence import UPDATES, pair_groups, supervised  # noqa: E402

SETTINGS = TrainSettings(learning_rate=1e-3, schedule="constant", warmup=0.0, clip=0, token_budget=120)
KINDS: dict[str, AnyAdapter] = {
    "dora": LoraSettings(rank=2, dora=True),
    "pissa": LoraSettings(rank=2, initial="pissa", rate_ratio=4),
    "ia3": Ia3Settings(kind="ia3"),
    "prefix": PrefixSettings(kind="prefix", tokens=3),
    "projection": PrefixSettings(kind="prefix", tokens=3, projection=8),
    "prompt": PromptSettings(kind="prompt", tokens=3),
    "p_tuning": PTuningSettings(kind="p_tuning", tokens=3, hidden=8),
    "lstm": PTuningSettings(kind="p_tuning", tokens=3, hidden=8, encoder="lstm"),
    "weights": WeightsSettings(kind="weights", train=("*.layers.1.*",)),
}


def updated(trained: Any, task: str, strategy: Strategy, directory: Path) -> dict[str, Any]:
    if task == "sft":
        _, loss, groups, weight = supervised("sft")
    else:
        loss, groups, weight = pairwise_ranking("pair", 0.0), pair_groups(), weigh_pairs("pair")
    trainer = Trainer(trained.module, loss, SETTINGS, strategy, total=UPDATES, seed=0)
    mine = trainer.share(groups)
    losses = [trainer.step(mine, weight(mine), groups[0])["loss"] for _ in range(UPDATES)]
    with trainer.whole():
        if strategy.main:
            save_model(trained.model, chat().tokenizer, directory, base_digest=trained.base_digest)
    strategy.barrier()
    (file,) = directory.glob("*.safetensors")
    return {"losses": losses, "weights": {name: t.flatten().tolist() for name, t in load_file(file).items()}}


def table(strategy: Strategy, root: Path) -> dict[str, Any]:
    """By kind and task; `again` is SFT that goes on from the adapter that SFT saved. All ranks see `root`."""
    found = {}
    if strategy.main:
        save(root / "base", "policy", policy().model)
    strategy.barrier()
    base = artifact(root / "base", "policy")
    for kind, settings in KINDS.items():
        place = root / kind
        first = open_trainable(base, settings, 0)
        found[f"{kind} sft"] = updated(first, "sft", strategy, place / "sft")
        bases = {base.digest: base.path} if first.base_digest else {}
        again = open_trainable(artifact(place / "sft", "policy", bases=bases), None, 0)
        found[f"{kind} again"] = updated(again, "sft", strategy, place / "again")
        scorer = open_trainable_classifier(base, settings, 0)
        found[f"{kind} reward"] = updated(scorer, "reward", strategy, place / "reward")
    return found


def main(out: str, strategy: str, stage: str = "2") -> None:
    torch.set_num_threads(1)
    processes = int(os.environ["WORLD_SIZE"])
    made = build(processes=processes, strategy=strategy, device="cpu", zero_stage=int(stage), clip=0)
    Path(f"{out}.{made.rank}").write_text(json.dumps(table(made, Path(f"{out}.models"))), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stderr.flush()
    os._exit(0)  # as tests/train/ranks.py ends
