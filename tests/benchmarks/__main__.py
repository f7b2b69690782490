"""Benchmarks side by side with other people's code.

    python -m tests.benchmarks                what there is
    python -m tests.benchmarks sft            a table
    python -m tests.benchmarks sft --json     one JSON line a figure on standard output
    python -m tests.benchmarks sft --small    a smoke test in a minute; its figures mean nothing
    python -m tests.benchmarks ppo --case "hidden 64, mixed"    only the cases whose names hold this text

Progress goes to standard error, and so does the table under --json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib import import_module

BENCHMARKS = {
    "core": "a training step of the core, tokens a second, against transformers' LlamaForCausalLM",
    "sft": "SFT, tokens a second, against TRL's SFTTrainer",
    "generate": "sampling, tokens a second, against transformers.generate",
    "ppo": "PPO, episodes a second, against TRL 1.12's PPOTrainer",
    "reward": "reward models, comparisons a second, against TRL's RewardTrainer",
    "dpo": "DPO, comparisons a second, against TRL's DPOTrainer",
    "rloo": "RLOO with K = 8, completions a second, against TRL's RLOOTrainer",
    "scaling": "several processes, tokens a second and memory a rank, against one",
    "estimate": "peak memory of every stage that `rlhf estimate` predicts, MB, against what is measured",
    "memory": "peak memory of a training step under every saver, MB, against the plain way",
    "safety": "what checkpoints inside a row cost, steps a second, against none",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=sorted(BENCHMARKS))
    parser.add_argument("--json", action="store_true", help="one JSON line a figure")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--repeats", type=int, help="alternating repetitions")
    parser.add_argument("--threads", type=int, help="of every contestant, 2 by default")
    parser.add_argument("--case", default="", help="only the cases whose names hold this text")
    arguments = parser.parse_args()
    if arguments.name is None:
        print("\n".join(f"{name:10} {what}" for name, what in BENCHMARKS.items()))
        return 0
    if arguments.threads:
        os.environ["BENCH_THREADS"] = str(arguments.threads)
    os.environ["BENCH_CASE"] = arguments.case
    from tests.benchmarks.common import QUIET, table

    os.environ.update(QUIET)
    bench = import_module(f"tests.benchmarks.{arguments.name}")
    figures = bench.run(small=arguments.small, repeats=arguments.repeats)
    for figure in figures if arguments.json else ():
        print(json.dumps(figure), flush=True)
    print(table(figures), file=sys.stderr if arguments.json else sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
