"""Trains the tiny model as one rank of several and writes what came out as JSON.

torchrun --nproc_per_node 2 tests/train/ranks.py OUT STRATEGY [ZERO_STAGE [WHAT [OFFLOAD [PRECISION]]]]

WHAT is records, ratings, held, parked, poisoned, spikes or stopped.

`stopped` leaves without a word in the third step, and goes on with checkpoints under OUT.work when called again.
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
from torch import nn  # noqa: E402

from pipeline.algo.preference import Kto  # noqa: E402
from pipeline.data.records import Rated  # noqa: E402
from pipeline.flow.errors import NonFinite  # noqa: E402
from pipeline.train.batches import Plan, weigh_tokens  # noqa: E402
from pipeline.train.loop import LossSums, Trainer, fit  # noqa: E402
from pipeline.train.parked import Parked  # noqa: E402
from pipeline.train.preferences import PARTS, training_of  # noqa: E402
from pipeline.train.reference import with_reference  # noqa: E402
from pipeline.train.settings import TrainSettings  # noqa: E402
from pipeline.train.strategy import Strategy, build  # noqa: E402
from tests.small import ask, chat, policy  # noqa: E402
from tests.train.tiny import Listener, Tiny, next_token, records  # noqa: E402


def train(strategy: Strategy, root: Path | None = None, leave_in: int | None = None) -> dict[str, object]:
    """9 records in batches of 4, 4 and 1, unequal lengths, several passes a step; the last batch is one
    rank's.
    """
    settings = TrainSettings(batch=4, token_budget=14, learning_rate=1e-2, evaluations=2, checkpoint_every=1)
    plan = Plan(records(9), settings, seed=1, strategy=strategy)
    trainer = Trainer(Tiny(), next_token, settings, strategy, total=len(plan), seed=3)
    heldout = trainer.share(records(5, longest=9))
    heard = Listener(root)
    step = trainer.step

    def stepping(*arguments: Any) -> dict[str, float]:
        if trainer.done + 1 == leave_in:
            os._exit(0)
        return step(*arguments)

    trainer.step = stepping  # type: ignore[method-assign, assignment]
    outcome = fit(
        trainer,
        plan,
        heard,
        evaluate=lambda: trainer.evaluate(heldout, weigh_tokens(heldout)) | {"age": trainer.done},
        best_by="age",  # the first evaluation is the best, so its weights come back at the end
    )
    with trainer.whole():
        state = {name: tensor.detach().clone() for name, tensor in trainer.module.state_dict().items()}
    return {
        "rank": strategy.rank,
        "world": strategy.world,
        "lines": [{k: v for k, v in line.items() if not k.startswith("time/")} for line in heard.lines],
        "last": outcome.last,
        "kept": outcome.kept_step,
        "evaluations": outcome.evaluations,
        "weights": {name: tensor.flatten().tolist() for name, tensor in state.items()},
    }


def train_spiky(strategy: Strategy) -> dict[str, object]:
    """7 steps, several passes each; the loss of the sixth is a hundred times what it was."""
    settings = TrainSettings(batch=4, token_budget=14, learning_rate=1e-2, epochs=3, skip_spikes=6.0, spike_window=8)
    plan = Plan(records(9), settings, seed=1, strategy=strategy)

    def loss(module: Any, forest: Any) -> Any:
        out = next_token(module, forest)
        return LossSums({"tokens": out.terms["tokens"] * (100.0 if trainer.done == 5 else 1.0)})

    trainer = Trainer(Tiny(), loss, settings, strategy, total=len(plan), seed=3)
    steps = [trainer.step(batch.groups, batch.weights, batch.filler) for batch in plan]
    with trainer.whole():
        state = {name: tensor.detach().clone() for name, tensor in trainer.module.state_dict().items()}
    return {
        "rank": strategy.rank,
        "skipped": [step["skipped"] for step in steps],
        "losses": [step["loss"] for step in steps],
        "weights": {name: tensor.flatten().tolist() for name, tensor in state.items()},
    }


def train_held(strategy: Strategy) -> dict[str, object]:
    """5 steps, in the first 2 of which embedding and norm are held, as a policy is while its critic warms up."""
    settings = TrainSettings(batch=4, token_budget=14, learning_rate=1e-2, epochs=2, weight_decay=0.1)
    plan = Plan(records(9), settings, seed=1, strategy=strategy)
    rates = dict.fromkeys(("embedding.", "norm.", "middle.", "head."), 1.0)
    trainer = Trainer(Tiny(), next_token, settings, strategy, total=len(plan), seed=3, rates=rates)
    losses, embeddings = [], []
    for number, batch in enumerate(plan):
        trainer.held = ("embedding.", "norm.") if number < 2 else ()
        losses.append(trainer.step(batch.groups, batch.weights, batch.filler)["loss"])
        with trainer.whole():
            state = {name: tensor.detach().clone() for name, tensor in trainer.module.state_dict().items()}
        embeddings.append(state["embedding.weight"])
    return {
        "rank": strategy.rank,
        "losses": losses,
        "still": [torch.equal(e, Tiny().embedding.weight) for e in embeddings],
        "weights": {name: tensor.flatten().tolist() for name, tensor in state.items()},
    }


def ratings(n: int) -> list[Rated]:
    """Answers of unequal lengths, two of three desirable."""
    return [Rated(ask("q" * (i % 4 + 1)), "good" * (i + 1) if i % 3 else "bad" * (i + 1), i % 3 != 0) for i in range(n)]


def train_ratings(strategy: Strategy) -> dict[str, object]:
    """KTO on 7 answers in batches of 3, 3 and 1, several passes a step."""
    training = training_of(Kto(desirable_weight=4.0))
    settings = TrainSettings(batch=3, token_budget=70, learning_rate=1e-3, warmup=0.0, schedule="constant", clip=0)

    def plan_of(groups: Any) -> Plan:
        return training.plan(groups, settings, seed=1, strategy=strategy, weigh=training.weigh)

    plan = plan_of(training.encode(ratings(7), chat(), 99).groups)
    trainer = training.trainer(policy().module, settings, strategy, total=len(plan), seed=3)
    plan = plan_of(with_reference(trainer, plan, Listener(), PARTS))
    steps = [trainer.step(batch.groups, batch.weights, batch.filler) for batch in plan]
    with trainer.whole():
        state = {name: tensor.detach().clone() for name, tensor in trainer.module.state_dict().items()}
    return {
        "rank": strategy.rank,
        "world": strategy.world,
        "points": [step["reference_point"] for step in steps],
        "losses": [step["loss"] for step in steps],
        "weights": {name: tensor.flatten().tolist() for name, tensor in state.items()},
    }


class Poison(torch.autograd.Function):
    """The number itself, with a gradient that is none."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * float("nan")


def poisoned(strategy: Strategy, precision: str) -> dict[str, object]:
    """Two good steps, then one whose loss is finite on every rank and whose gradient is not on the last one."""
    settings = TrainSettings(batch=4, token_budget=14, learning_rate=1e-2, precision=precision)  # type: ignore[arg-type]
    plan = Plan(records(12), settings, seed=1, strategy=strategy)

    def loss(module: Any, forest: Any) -> Any:
        out = next_token(module, forest)
        if trainer.done == 2 and strategy.rank == strategy.world - 1:
            out.terms["tokens"] = Poison.apply(out.terms["tokens"])
        return out

    trainer = Trainer(Tiny(), loss, settings, strategy, total=len(plan), seed=3)
    before, message = [], ""
    for batch in plan:
        before = [tensor.detach().clone() for tensor in trainer.engine.state().values()]
        try:
            trainer.step(batch.groups, batch.weights, batch.filler)
        except NonFinite as error:
            message = str(error)
            break
    after = list(trainer.engine.state().values())
    same = len(before) == len(after) and all(map(torch.equal, before, after))
    return {"rank": strategy.rank, "message": message, "same": same, "done": trainer.done}


def frozen_models() -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Two frozen models with one weight in common, and a trained one with the first one's bias."""
    torch.manual_seed(0)
    one, other, trained = (nn.Linear(5, 3).requires_grad_(False) for _ in range(3))
    other.weight, trained.bias = one.weight, one.bias
    return one, other, trained


def park(strategy: Strategy) -> dict[str, object]:
    one, other, trained = frozen_models()
    parked = Parked(strategy, "sharded", [one, other], [trained])
    between = [p.numel() for p in (one.weight, other.weight, other.bias, one.bias)]
    inside = []
    for _ in range(2):
        with parked.whole(one, other):
            inside.append([[p.flatten().tolist() for p in m.parameters()] for m in (one, other)])
    half = nn.Linear(3, 1, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    half.weight.copy_(torch.tensor([0.5, 1.5, -2.0]))
    with Parked(strategy, "sharded", [half]).whole(half):
        values = half.weight.flatten().tolist()
    return {"rank": strategy.rank, "inside": inside, "between": between, "bytes": parked.bytes, "half": values}


def main(
    out: str, strategy: str, stage: str = "2", what: str = "records", offload: str = "none", precision: str = "fp32"
) -> None:
    torch.set_num_threads(1)
    made = build(
        processes=int(os.environ["WORLD_SIZE"]),
        strategy=strategy,
        device="cpu",
        zero_stage=int(stage),
        offload=offload,
        precision=precision,
        clip=1.0,
    )
    if what == "ratings":
        found = train_ratings(made)
    elif what == "held":
        found = train_held(made)
    elif what == "spikes":
        found = train_spiky(made)
    elif what == "poisoned":
        found = poisoned(made, precision)
    elif what == "parked":
        found = park(made)
    else:
        root = Path(f"{out}.work")
        begun = root.exists()
        made.barrier()  # before anybody makes it
        found = train(made, root, leave_in=3 if what == "stopped" and not begun else None)
    Path(f"{out}.{found['rank']}").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    # As the project's workers leave: at the ordinary end of the interpreter, static destructors below DeepSpeed now and
    # then abort ("terminate called without an active exception"), after all work is done.
    sys.stderr.flush()
    os._exit(0)
