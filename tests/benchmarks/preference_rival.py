"""TRL's side of the reward and DPO benchmarks: its own trainers, stopped between turns by a callback."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

from tests.benchmarks.common import THREADS, Stand, peak_mb, set_products
from tests.benchmarks.preference import Task
from tests.benchmarks.shapes import policy_files, reward_files, tokenizer


def rows(task: Task) -> dict[str, list[list[int]]]:
    """Columns of ids. A ranking of several answers becomes all its pairs."""
    columns: dict[str, list[list[int]]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for prompt, answers in task.records():
        for better in range(len(answers)):
            for worse in range(better + 1, len(answers)):
                columns["prompt_ids"].append(prompt)
                columns["chosen_ids"].append(answers[better])
                columns["rejected_ids"].append(answers[worse])
    if task.kind == "reward":  # its trainer takes whole dialogues
        prompts = columns.pop("prompt_ids")
        columns = {name: [p + a for p, a in zip(prompts, ids, strict=True)] for name, ids in columns.items()}
    return columns


def arguments(task: Task, folder: str, updates: int) -> dict[str, Any]:
    pairs = task.batch * task.pairs_each
    return {
        "output_dir": folder,
        "per_device_train_batch_size": task.micro,
        "gradient_accumulation_steps": pairs // task.micro,
        "max_steps": updates,
        "learning_rate": 1e-4,
        "max_grad_norm": 1.0,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }


def main(task: Task) -> None:
    import torch
    from datasets import Dataset
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    torch.set_num_threads(THREADS)
    set_products(task.products)
    stand = Stand()
    updates = task.steps * (task.turns + 1)
    seen = {"loss": 0.0}

    class Turns(TrainerCallback):
        """Runs `task.steps` updates to warm up, then as many for every turn."""

        wall = cpu = start_mb = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.start_mb = peak_mb()

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % task.steps:
                return
            if state.global_step:
                if state.global_step == task.steps:
                    stand.answer(start_mb=self.start_mb, first_loss=seen["loss"])
                if not stand.wait():
                    raise SystemExit(0)
            self.wall, self.cpu = time.perf_counter(), time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % task.steps == 0 and state.global_step > task.steps:
                wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
                done = task.batch * task.steps
                stand.answer(rate=done / wall, cpu_rate=done / cpu, peak_mb=peak_mb())

    class Observed:
        """Adds up the loss of the first step; takes rows of ids as they are."""

        def training_step(self, *given: Any, **named: Any) -> Any:
            loss = super().training_step(*given, **named)  # type: ignore[misc]
            if self.state.global_step == 0:  # type: ignore[attr-defined]
                seen["loss"] += float(loss)
            return loss

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    class Reward(Observed, RewardTrainer):
        pass

    class Dpo(Observed, DPOTrainer):
        pass

    with tempfile.TemporaryDirectory() as folder:
        common = {
            "train_dataset": Dataset.from_dict(rows(task)),
            "processing_class": tokenizer(task.vocabulary),
            "callbacks": [Turns()],
        }
        given = arguments(task, folder, updates)
        if task.kind == "reward":
            model = LlamaForSequenceClassification.from_pretrained(reward_files(task.models).path)
            Reward(model=model, args=RewardConfig(**given), **common).train()
        else:
            model = LlamaForCausalLM.from_pretrained(policy_files(task.models).path)
            settings = DPOConfig(**given, beta=0.1, precompute_ref_log_probs=True, precompute_ref_batch_size=16)
            Dpo(model=model, args=settings, **common).train()


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
