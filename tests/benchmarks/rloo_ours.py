"""Our side of the RLOO benchmark: the parts of stages/ppo.py with `advantages: rloo`, that is, without a critic."""

from __future__ import annotations

import json
import sys

from tests.benchmarks.rloo import Task


def main(task: Task) -> None:
    from stages.ppo import Ppo

    if "advantages" not in Ppo.Config.model_fields:
        raise SystemExit("stages/ppo.py has no setting `advantages`: there is no RLOO of ours to measure yet")
    raise SystemExit("stages/ppo.py has `advantages`: compose it here as ppo_ours.py does, with advantages: rloo")


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
