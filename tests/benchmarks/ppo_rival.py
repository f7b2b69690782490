"""TRL 1.12's side of the PPO benchmark: its own trainer, stopped between iterations by a callback."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

from tests.benchmarks.common import THREADS, Clock, Stand, peak_mb, set_products
from tests.benchmarks.ppo import Task
from tests.benchmarks.shapes import STOP, policy_files, reward_files, tokenizer

PAD = "<|nothing|>"  # an id beyond the model's own, so that no sampled token is taken for padding


def probe(task: Task, trainer: Any, models: dict[str, Any], pad: int) -> dict[str, list[float]]:
    """Log-probs, values and scores of fixed answers by the functions that TRL's loop calls."""
    import torch
    from trl.experimental.ppo import ppo_trainer
    from trl.trainer.utils import selective_log_softmax

    prompts, answers = zip(*task.probe(), strict=True)
    start = len(prompts[0])
    ids = torch.tensor([p + a for p, a in zip(prompts, answers, strict=True)])
    with torch.no_grad():
        logits = ppo_trainer.forward(models["policy"], ids, pad).logits[:, start - 1 : -1]
        values, _, _ = ppo_trainer.get_reward(models["value"], ids, pad, start)
        padded = torch.nn.functional.pad(ids, (0, 1), value=pad)  # its end is looked for
        _, scores, _ = ppo_trainer.get_reward(models["reward"], padded, pad, start)
    return {
        "logprobs": selective_log_softmax(logits, ids[:, start:]).flatten().tolist(),
        "values": values[:, start - 1 : -1].flatten().tolist(),
        "scores": scores.tolist(),
    }


def main(task: Task) -> None:
    import torch
    from datasets import Dataset
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    torch.set_num_threads(THREADS)
    outside = "highest" if task.products == "highest" else "medium"
    inside = "medium" if task.products == "medium" else "highest"
    set_products(outside)
    policy, reference = (LlamaForCausalLM.from_pretrained(policy_files(task.models).path) for _ in range(2))
    value, reward = (LlamaForSequenceClassification.from_pretrained(reward_files(task.models).path) for _ in range(2))
    words = tokenizer(task.vocabulary, PAD)
    stand, clock = Stand(), Clock()
    generation, forward = ppo_trainer.batch_generation, ppo_trainer.forward
    made: list[int] = []
    seen: dict[str, Any] = {"generated": 0.0, "updating": 0.0, "tokens": 0}
    register_optimizer_step_post_hook(lambda *_: made.append(1))

    def timed_generation(model: Any, queries: Any, *arguments: Any) -> Any:
        set_products(inside)
        with clock("generation"):
            out = generation(model, queries, *arguments)
        set_products(outside)
        answers = out[0][:, queries.shape[1] :]
        ended = (answers == STOP).cumsum(1) - (answers == STOP).long() > 0
        seen["tokens"] = int((~ended).sum()) if task.stops else answers.numel()
        seen["generated"], seen["updating"] = time.perf_counter(), 0.0
        return out

    def timed_forward(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and not seen["updating"]:
            seen["updating"] = time.perf_counter()
            clock.add("scoring", seen["updating"] - seen["generated"])
        return forward(*arguments)

    ppo_trainer.batch_generation, ppo_trainer.forward = timed_generation, timed_forward

    class Turns(TrainerCallback):
        """One iteration to warm up, then one for every turn."""

        wall = cpu = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            now, cpu = time.perf_counter(), time.process_time()
            if state.global_step == 1:
                stand.answer(**ready)
            else:
                clock.add("updates", now - seen["updating"])
                stand.answer(
                    rate=task.episodes / (now - self.wall),
                    cpu_rate=task.episodes / (cpu - self.cpu),
                    peak_mb=peak_mb(),
                    seconds=clock.read(now - self.wall),
                    tokens=seen["tokens"],
                    updates=len(made),
                )
            if not stand.wait():
                raise SystemExit(0)
            made.clear()
            clock.read(0.0)
            self.wall, self.cpu = time.perf_counter(), time.process_time()

    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=folder,
                per_device_train_batch_size=task.episodes,
                gradient_accumulation_steps=1,
                num_mini_batches=-(-task.episodes // task.minibatch),
                num_ppo_epochs=task.epochs,
                total_episodes=task.episodes * (task.turns + 2),
                local_rollout_forward_batch_size=task.rollout,
                response_length=task.new,
                stop_token_id=STOP if task.stops else None,
                temperature=1.0,
                learning_rate=task.learning_rate,
                lr_scheduler_type="constant",
                kl_coef=0.05,
                vf_coef=0.1,
                num_sample_generations=0,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                dataloader_num_workers=0,
                dataloader_pin_memory=False,
            ),
            processing_class=words,
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=Dataset.from_dict({"input_ids": task.prompt_ids()}),
            callbacks=[Turns()],
        )
        ready = probe(task, trainer, {"policy": policy, "value": value, "reward": reward}, words.pad_token_id)
        trainer.train()


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
