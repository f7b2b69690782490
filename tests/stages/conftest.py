"""A whole chain on a shrunken world, run once by the real command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PLAN = """
sources:
  world: {kind: world, documents: 400, heldout_documents: 30, conversations: 60, comparisons: 60, heldout_pairs: 40,
          prompts: 40, dev: 10, heldout: 20}
  pairs: {kind: comparisons, path: pairs.jsonl}
rows:
  - pretrain:     {documents: world.documents, heldout: world.heldout_documents}
  - sft:          {policy: pretrain.policy, conversations: world.conversations}
  - reward:       {policy: sft.policy, comparisons: pairs, heldout: world.heldout_pairs, prompts: world.prompts}
  - ppo:          {policy: sft.policy, reward: reward.model, prompts: world.prompts}
  - rejection:    {policy: ppo.policy, reward: reward.model, prompts: world.prompts}
  - dpo:          {policy: rejection.policy, comparisons: rejection.comparisons}
  - evaluate:     {policies: [sft.policy, ppo.policy, dpo.policy], reference: sft.policy, reward: reward.model,
                   prompts: world.heldout, judge: world.judge, documents: world.heldout_documents,
                   pairs: world.heldout_pairs}
stages:
  pretrain:  {model: {preset: test}, vocab_size: 400, train: {steps: 30, batch_tokens: 1024, learning_rate: 0.01}}
  sft:       {train: {batch: 8, epochs: 1, learning_rate: 0.003}}
  reward:    {normalise_prompts: 16, max_new_tokens: 12, train: {batch: 8, keep: last}}
  ppo:       {iterations: 2, prompts: 8, minibatch: 8, sampling: {samples: 2, max_new_tokens: 12}}
  rejection: {prompts: 16, sampling: {samples: 4, max_new_tokens: 12}, train: {batch: 8}}
  dpo:       {train: {batch: 4}}
  evaluate:  {best_of: 4, max_new_tokens: 12}
"""


class Chain:
    """A directory with a plan in it, and the command line."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.plan = directory / "plan.yaml"

    def rlhf(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline", *arguments]
        return subprocess.run(command, cwd=self.directory, capture_output=True, text=True, timeout=400, env=env)

    def run(self, *arguments: str) -> dict[str, dict]:
        """Rows of `rlhf run --json` by name."""
        done = self.rlhf("run", "plan.yaml", "--json", *arguments)
        assert done.returncode == 0, done.stderr
        return {row["row"]: row for row in json.loads(done.stdout)["rows"]}


PAIR = {
    "prompt": [{"role": "user", "content": "What colour is grass?"}],
    "completions": [{"text": "Grass is green.", "rank": 0}, {"text": "Go away.", "rank": 1}],
}


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    directory = tmp_path_factory.mktemp("chain")
    (directory / "plan.yaml").write_text(PLAN)
    with open(directory / "pairs.jsonl", "w") as file:
        for i in range(40):
            pair = json.loads(json.dumps(PAIR).replace("grass", f"thing {i}"))
            file.write(json.dumps(pair) + "\n")
    return Chain(directory)


@pytest.fixture(scope="session")
def first(chain: Chain) -> dict[str, dict]:
    return chain.run()
