"""TRL's side of the RLOO benchmark: its own trainer, stopped between iterations by a callback."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

from tests.benchmarks.common import THREADS, Clock, Stand, peak_mb, set_products
from tests.benchmarks.rloo import Task
from tests.benchmarks.shapes import policy_files, reward_files, tokenizer


def scored(model: Any, sequences: list[list[int]]) -> list[float]:
    """Scores at the last token of each sequence, padded on the right."""
    import torch

    width = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
    last = torch.tensor([len(s) - 1 for s in sequences])
    mask = torch.arange(width) <= last[:, None]
    with torch.inference_mode():
        states = model.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        return model.score(states[torch.arange(len(ids)), last])[:, 0].tolist()


def main(task: Task) -> None:
    import torch
    from datasets import Dataset
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from transformers import LlamaForSequenceClassification, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    torch.set_num_threads(THREADS)
    outside = "highest" if task.products == "highest" else "medium"
    inside = "medium" if task.products == "medium" else "highest"
    set_products(outside)
    reward_model = LlamaForSequenceClassification.from_pretrained(reward_files(task.models).path).eval()
    ids = task.prompt_ids()
    texts = [" ".join(["<|bos|>", *(f"w{i}" for i in p[1:])]) for p in ids]
    stand, clock = Stand(), Clock()
    made: list[int] = []
    seen: dict[str, Any] = {"tokens": 0}
    register_optimizer_step_post_hook(lambda *_: made.append(1))

    def reward(completion_ids: list[list[int]], prompt_ids: list[list[int]], **_: Any) -> list[float]:
        seen["tokens"] = sum(map(len, completion_ids))
        return scored(reward_model, [p + c for p, c in zip(prompt_ids, completion_ids, strict=True)])

    class Timed(RLOOTrainer):
        def _generate(self, prompts: list[Any]) -> Any:
            set_products(inside)
            with clock("generation"):
                out = super()._generate(prompts)
            set_products(outside)
            return out

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            begin, before = time.perf_counter(), clock.seconds.get("generation", 0.0)
            out = super()._generate_and_score_completions(inputs)
            clock.add("scoring", time.perf_counter() - begin - (clock.seconds["generation"] - before))
            return out

        def compute_loss(self, *given: Any, **named: Any) -> Any:
            seen.setdefault("updating", time.perf_counter())
            return super().compute_loss(*given, **named)

    class Turns(TrainerCallback):
        """One iteration to warm up, then one for every turn."""

        wall = cpu = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % task.updates:
                return
            now, cpu = time.perf_counter(), time.process_time()
            if state.global_step == task.updates:
                stand.answer(**ready)
            else:
                clock.add("updates", now - seen["updating"])
                stand.answer(
                    rate=task.completions / (now - self.wall),
                    cpu_rate=task.completions / (cpu - self.cpu),
                    peak_mb=peak_mb(),
                    seconds=clock.read(now - self.wall),
                    tokens=seen["tokens"],
                    updates=len(made),
                )
            if not stand.wait():
                raise SystemExit(0)
            made.clear()
            clock.read(0.0)
            seen.pop("updating", None)
            self.wall, self.cpu = time.perf_counter(), time.process_time()

    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            model=str(policy_files(task.models).path),
            reward_funcs=reward,
            args=RLOOConfig(
                output_dir=folder,
                per_device_train_batch_size=task.minibatch,
                gradient_accumulation_steps=1,
                steps_per_generation=task.updates,
                num_iterations=1,
                num_generations=task.samples,
                max_completion_length=task.new,
                max_steps=task.updates * (task.turns + 2),
                learning_rate=task.learning_rate,
                lr_scheduler_type="constant",
                beta=0.05,
                temperature=1.0,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                dataloader_num_workers=0,
                dataloader_pin_memory=False,
                model_init_kwargs={"dtype": "float32"},
            ),
            processing_class=tokenizer(task.vocabulary),
            train_dataset=Dataset.from_dict({"prompt": texts, "prompt_ids": ids}),
            callbacks=[Turns()],
        )
        prompts, answers = zip(*task.probe(), strict=True)
        rows = torch.tensor([p + a for p, a in zip(prompts, answers, strict=True)])
        with torch.no_grad():
            logps, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, rows, torch.ones_like(rows), len(answers[0]), len(rows)
            )
        ready = {"logprobs": logps.flatten().tolist(), "scores": scored(reward_model, rows.tolist())}
        trainer.train()


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
