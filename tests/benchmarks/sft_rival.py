"""TRL's side of the SFT benchmark: its own trainer, stopped between turns by a callback."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

from tests.benchmarks.common import THREADS, Stand, peak_mb
from tests.benchmarks.sft import Task


def tokenizer(vocabulary: int) -> Any:
    """A word-level tokenizer of the right size: the records are ids already, the trainer only wants one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocabulary)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )


def leaks(model: Any, task: Task) -> bool:
    """Whether a token of one packed sample changes the logits of the next."""
    import torch

    ids = torch.tensor([[*range(3, 13), *range(20, 40)]])
    positions = torch.tensor([[*range(10), *range(20)]])
    changed = ids.clone()
    changed[0, 4] = 50
    with torch.no_grad():
        before, after = (model(input_ids=x, position_ids=positions).logits[0, 10:] for x in (ids, changed))
    return not torch.equal(before, after)


def configuration(task: Task, folder: str, updates: int) -> Any:
    from trl import SFTConfig

    rows = (
        task.batch if not task.packed else max(1, round(task.batch * (task.shortest + task.longest) / 2 / task.packed))
    )
    micro = min(task.micro, rows)
    return SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=max(1, round(rows / micro)),
        max_steps=updates,
        learning_rate=1e-4,
        max_grad_norm=1.0,
        use_cpu=True,
        bf16=task.precision == "bf16",
        gradient_checkpointing=False,
        packing=bool(task.packed),
        packing_strategy="bfd",
        max_length=task.packed or task.longest,
        train_sampling_strategy="sequential",
        shuffle_dataset=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        dataset_num_proc=None,
    )


def main(task: Task) -> None:
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTTrainer

    torch.set_num_threads(THREADS)
    stand = Stand()
    model = task.model()
    model.config.use_cache = False  # else packed samples see each other
    if task.packed and leaks(model, task):
        raise SystemExit("packed samples leak into each other: this is no rival")
    updates = task.steps * (task.turns + 1)

    class Turns(TrainerCallback):
        """Runs `task.steps` updates to warm up, then as many for every turn."""

        begin = 0.0
        start_mb = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.start_mb = peak_mb()

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % task.steps:
                return
            if state.global_step:
                if state.global_step == task.steps:
                    stand.answer(start_mb=self.start_mb, first_loss=None if task.packed else seen["loss"])
                if not stand.wait():
                    raise SystemExit(0)
            seen["tokens"] = 0
            self.begin = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % task.steps == 0 and state.global_step > task.steps:
                seconds = time.perf_counter() - self.begin
                stand.answer(rate=seen["tokens"] / seconds, peak_mb=peak_mb())

    seen: dict[str, float] = {"tokens": 0, "loss": 0.0, "passes": 0}

    class Counting(SFTTrainer):
        """Counts real tokens as they go through; adds up the loss of the first step."""

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            mask = inputs.get("attention_mask")
            seen["tokens"] += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
            loss = super().training_step(model, inputs, num_items_in_batch)
            if self.state.global_step == 0:
                seen["loss"] += float(loss)
            return loss

    with tempfile.TemporaryDirectory() as folder:
        Counting(
            model=model,
            args=configuration(task, folder, updates),
            train_dataset=Dataset.from_dict({"input_ids": task.records()}),
            processing_class=tokenizer(task.vocabulary),
            callbacks=[Turns()],
        ).train()


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
