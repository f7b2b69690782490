"""transformers' side of the sampling benchmark: `generate` on batches of prompts of similar length."""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.benchmarks.common import THREADS, Stand, set_products
from tests.benchmarks.generate import Task
from tests.benchmarks.generate_ours import GREEDY
from tests.benchmarks.shapes import STOP, policy_files


def padded(batch: list[list[int]]) -> dict[str, Any]:
    """Prompts side by side, padded on the left."""
    import torch

    width = max(map(len, batch))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in batch])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
    return {"input_ids": ids, "attention_mask": mask}


def main(task: Task) -> None:
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    torch.set_num_threads(THREADS)
    set_products(task.products)
    model = LlamaForCausalLM.from_pretrained(policy_files(task.models).path, attn_implementation=task.attention).eval()
    greedy_only = GenerationConfig(max_new_tokens=GREEDY, do_sample=False, pad_token_id=0, suppress_tokens=[STOP])
    prompts = task.prompt_ids()
    greedy = model.generate(**padded(prompts[:GREEDY]), generation_config=greedy_only)[:, -GREEDY:]
    if task.compiled:
        model.forward = torch.compile(model.forward)
    settings = GenerationConfig(
        max_new_tokens=task.new,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        pad_token_id=0,
        eos_token_id=STOP if task.stops else None,
        disable_compile=True,
        **({} if task.cache == "dynamic" else {"cache_implementation": task.cache}),
    )
    ordered = sorted(prompts, key=len)
    batches = [ordered[i : i + task.batch] for i in range(0, len(ordered), task.batch)]

    def turn() -> dict[str, float]:
        tokens = 0
        with stand.measure() as time:
            for batch in batches:
                inputs = padded(batch)
                out = model.generate(**inputs, generation_config=settings)[:, inputs["input_ids"].shape[1] :]
                ended = (out == STOP).cumsum(1) - (out == STOP).long() > 0  # behind the first stop token
                tokens += int((~ended).sum()) if task.stops else out.numel()
        return {**time.rates(tokens), "tokens": tokens}

    stand = Stand()
    torch.manual_seed(0)
    turn()
    stand.answer(greedy=greedy.flatten().tolist())
    while stand.wait():
        stand.answer(**turn())


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
