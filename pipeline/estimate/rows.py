"""What the rows of a plan cost before anything runs: models followed along the wiring, tokens where a plan knows them.

    estimate(plan, device, Wishes()) -> [Estimate]      one a row that computes, in the plan's order

Where a plan leaves something open an assumption stands in `Wishes` and in the estimate's `notes`. No torch here, and no
stage: they are known by their names and settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pipeline.estimate import memory, operations
from pipeline.estimate.devices import Device
from pipeline.estimate.following import (
    WORLD,
    WORLD_ANSWER,
    WORLD_LONGEST,
    WORLD_TOKENS_A_WORD,
    Following,
    Records,
    Wishes,
    adapted,
    vocabulary_of,
)
from pipeline.estimate.memory import Drawing, Layout, Peak, Work
from pipeline.estimate.shape import Model, Shape, kv_bytes
from pipeline.flow.launch import launch_settings
from pipeline.flow.plan import Plan, Ref, Row
from pipeline.llama.adapter_settings import VirtualSettings

MILLION = 1e6
CACHE = 1 << 30  # bytes of the native engine's cache where a row has no engine settings
ROWS = 256  # and its rows


@dataclass
class Cost:
    """Operations of a row over all ranks. `read`: bytes that sampling reads, step by step, on one rank; `drawn_in`: its
    precision."""

    computed: float = 0.0
    drawn: float = 0.0
    read: float = 0.0
    drawn_in: str = "fp32"
    tokens: float = 0.0
    per_million: bool = False

    def seconds(self, device: Device, ranks: int, precision: str, utilisation: float) -> float:
        """Products at a share of the peak; a step of sampling reads all weights, which often takes longer."""
        rate = device.peak(precision) * utilisation * ranks
        drawing = self.drawn / (device.peak(self.drawn_in) * utilisation * ranks)
        return self.computed / rate + max(drawing, self.read / device.bandwidth if device.bandwidth else 0.0)


@dataclass(frozen=True)
class Estimate:
    row: str
    stage: str
    trained: int
    frozen: int
    cost: Cost
    seconds: float
    work: Work
    peak: Peak
    room: float  # bytes of a rank
    budget: int  # the most tokens a pass that fit
    key: str  # the setting that is compared with it
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.peak.total <= self.room and self.budget > 0


# ------------------------------------------------------------------------------------------------------------- the plan


def estimate(plan: Plan, device: Device, wishes: Wishes) -> list[Estimate]:
    """Every row that computes. UserError where the shape of a model cannot be known."""
    seen = Following(plan, device, wishes, launch_settings(plan.launch))
    found = []
    for row in plan.rows:
        if row.stage == "world":
            seen.records |= {
                f"{row.name}.{slot}": Records(
                    getattr(row.config, _counted(slot)), each, WORLD["prompts"], WORLD_LONGEST
                )
                for slot, each in WORLD.items()
            }
            long = WORLD_TOKENS_A_WORD * row.config.long_words  # type: ignore[attr-defined]
            seen.records |= {
                f"{row.name}.{slot}": Records(getattr(row.config, slot), long, None, math.ceil(1.2 * long))
                for slot in ("long_documents", "heldout_long_documents")
            }
        elif row.stage in STAGES:
            seen.notes = []
            found.append(_estimated(seen, row, *STAGES[row.stage](seen, row)))
    return found


def _counted(slot: str) -> str:
    return "conversations" if slot == "perfect_conversations" else slot


def _estimated(seen: Following, row: Row, work: Work, cost: Cost) -> Estimate:
    device, launch = seen.device, seen.launch
    room = device.memory
    if device.on_cpu:  # ranks on one machine share its memory
        room /= max(1, launch.processes // launch.nodes)
    precision = "bf16" if work.layout.half else "fp32"
    below = sum(m.parameters - m.trained for m in work.trained)
    if any(isinstance(m.adapter, VirtualSettings) for m in work.trained):
        seen.notes.append("virtual tokens: computed on padded rows, whose filling is not counted")
    return Estimate(
        row=row.name,
        stage=row.stage,
        trained=sum(m.trained for m in work.trained),
        frozen=below + sum(m.parameters for m in (*work.frozen, *work.guests)),
        cost=cost,
        seconds=cost.seconds(device, launch.processes, precision, seen.wishes.utilisation),
        work=work,
        peak=memory.peak(work),
        room=room,
        budget=memory.largest_budget(work, room),
        key="train.token_budget" if getattr(row.config, "train", None) else "token_budget",
        notes=tuple(dict.fromkeys(seen.notes)),
    )


# --------------------------------------------------------------------------------------------------- rows of the loop


def _length(seen: Following, row: Row, records: Records) -> float:
    """Of a record; as long as may be where nobody knows."""
    config: Any = row.config
    return min(records.tokens or config.max_tokens, config.max_tokens)


def _trained_tokens(seen: Following, row: Row, records: Records) -> tuple[float, bool]:
    """Tokens that a training row reads, and whether they are a million in place of the unknown number."""
    config: Any = row.config
    train, each = config.train, records.tokens
    if train.steps is not None and (train.batch_tokens or each):
        return train.steps * (train.batch_tokens or train.batch * each), False
    if train.steps is None and records.count and each:
        return train.epochs * records.count * each, False
    if seen.wishes.tokens is not None:
        return seen.wishes.tokens, False
    seen.notes.append(
        "how many tokens its records have is not known before they are read: costs are of a million (--tokens)"
    )
    return MILLION, True


def _training(
    seen: Following, row: Row, model: Model, records: Records, *, passes_before: float = 0, **more: Any
) -> tuple[Work, Cost]:
    """A row of the one loop. `passes_before`: forward passes over all records before the first update."""
    config: Any = row.config
    train = config.train
    tokens, per_million = _trained_tokens(seen, row, records)
    length = _length(seen, row, records)
    seen_pairs = tokens / length * operations.pairs([length])
    scored = 0.0 if model.scalar else tokens
    computed = operations.update(model, tokens, seen_pairs, scored, recomputed=train.checkpointing)
    epochs = max(train.epochs, 1.0)
    computed += passes_before / epochs * operations.forward(model, tokens, seen_pairs, scored)
    layout = seen.layout(train.precision, train.optimizer)
    in_a_pass = None
    if train.batch_tokens:
        in_a_pass = -(-train.batch_tokens // layout.ranks)
    elif records.longest:
        in_a_pass = -(-train.batch // layout.ranks) * records.longest
    steps = train.steps or (tokens / _step_tokens(train, records) if not per_million else None)
    held_out = any(row.inputs.get(slot) for slot in ("heldout", "heldout_rated", "dev"))
    work = Work(
        layout=layout,
        trained=(model,),
        token_budget=train.token_budget,
        longest=min(config.max_tokens, records.longest or config.max_tokens),
        in_a_pass=in_a_pass if in_a_pass and in_a_pass < train.token_budget else None,
        checkpointing=train.checkpointing,
        asks=held_out or passes_before > 0,
        saves=bool(train.checkpoint_every),
        snapshots=bool(train.checkpoint_every) and (steps is None or steps > train.checkpoint_every),
        best=held_out and train.keep == "best" and train.evaluations > 0,
    )
    return replace(work, **more), Cost(computed=computed, tokens=tokens, per_million=per_million)


def _step_tokens(train: Any, records: Records) -> float:
    return train.batch_tokens or train.batch * (records.tokens or 1.0)


def _pretrain(seen: Following, row: Row) -> tuple[Work, Cost]:
    config: Any = row.config
    tokenizer, start = row.inputs.get("tokenizer"), seen.one(row, "policy")
    vocabulary = config.vocab_size
    if isinstance(tokenizer, Ref):
        vocabulary = vocabulary_of(seen, tokenizer)
    model = replace(start, base=row.name) if start else Model(Shape.of(config.model.llama(vocabulary)), row.name)
    seen.models[f"{row.name}.policy"] = model
    seen.models[f"{row.name}.tokenizer"] = model
    work, cost = _training(seen, row, model, seen.read(row, "documents"))
    return replace(work, best=False if config.train.keep == "last" else work.best), cost


def _sft(seen: Following, row: Row) -> tuple[Work, Cost]:
    config: Any = row.config
    start = seen.one(row, "policy")
    assert start is not None
    if words := set(config.add_tokens):  # at most: those that its tokenizer has already are no rows more
        start = replace(start, shape=replace(start.shape, vocabulary=start.shape.vocabulary + len(words)))
        seen.notes.append(f"{row.name}: up to {len(words)} added tokens are counted as rows of the embeddings")
    model = adapted(row, start, config.adapter)
    seen.models[f"{row.name}.policy"] = model.saved()
    return _training(seen, row, model, seen.read(row, "conversations"))


def _reward(seen: Following, row: Row) -> tuple[Work, Cost]:
    config: Any = row.config
    start = seen.one(row, "policy")
    assert start is not None
    model = adapted(row, start, config.adapter, scalar=True)
    seen.models[f"{row.name}.model"] = model.saved()
    records = seen.read(row, "comparisons")
    if config.part and records.count:
        records = replace(records, count=records.count * (config.part[1] - config.part[0]))
    if not row.inputs.get("prompts"):
        return _training(seen, row, model, records)
    prompts = seen.read(row, "prompts")
    rows = min(ROWS, config.normalise_prompts)
    drawing = Drawing(rows, _columns(row, prompts, config.max_new_tokens), CACHE, config.max_new_tokens)
    work, cost = _training(seen, row, model, records, asks=True, guests=(start,), drawing=drawing)
    answers = min(config.normalise_prompts, prompts.count or config.normalise_prompts)
    _draw(seen, cost, work, start, answers, 1, prompts, config.max_new_tokens, drawing)
    _score(seen, cost, [model], answers, 1, prompts, config.max_new_tokens)
    return work, cost


def _dpo(seen: Following, row: Row) -> tuple[Work, Cost]:
    config: Any = row.config
    start = seen.one(row, "policy")
    assert start is not None
    model = adapted(row, start, config.adapter)
    seen.models[f"{row.name}.policy"] = model.saved()
    records = seen.read(row, "comparisons" if row.inputs.get("comparisons") else "rated")
    watching = _watching(seen, row, start)
    looks = float(config.loss.made().needs_reference)
    work, cost = _training(seen, row, model, records, passes_before=looks, frozen=watching)
    if row.inputs.get("dev"):
        drawing = Drawing(
            ROWS, _columns(row, seen.read(row, "dev"), config.max_new_tokens), CACHE, config.max_new_tokens
        )
        work = replace(work, drawing=drawing, asks=True)
        _look(seen, cost, work, row, model, watching, config.max_new_tokens, 1, drawing)
    return work, cost


# ---------------------------------------------------------------------------------------------------- rows that sample


def _prompt(seen: Following, row: Row, prompts: Records, new: int) -> float:
    config: Any = row.config
    room = config.max_tokens - new
    if prompts.prompt is None:
        seen.notes.append(f"prompts are taken to have {min(room, seen.wishes.prompt)} tokens (--prompt)")
    return min(room, prompts.prompt if prompts.prompt is not None else seen.wishes.prompt)


def _columns(row: Row, prompts: Records, new: int) -> int:
    config: Any = row.config
    return min(config.max_tokens, (prompts.longest or config.max_tokens) + new)


def _answer(prompts: Records, new: int) -> float:
    """Tokens of an answer; the longest where nobody knows."""
    return min(new, WORLD_ANSWER) if prompts.longest == WORLD_LONGEST else new


def _draw(
    seen: Following, cost: Cost, work: Work, model: Model, count: float, samples: int, prompts: Records, new: int,
    drawing: Drawing,
) -> None:  # fmt: skip
    """Adds `samples` answers to each of `count` prompts."""
    shape, own = model.shape, work.layout.residual
    width = 2 if drawing.half else own
    cost.drawn_in = "bf16" if width == 2 else "fp32"
    prompt, answer = prompts.prompt or seen.wishes.prompt, _answer(prompts, new)
    answers = count * samples
    cost.drawn += operations.sampling(model, count, prompt, answers, answer)
    mine = answers / work.layout.ranks
    rows = min(memory.cache_rows(drawing, shape, own), max(1.0, mine))
    steps = mine / rows * answer
    cost.read += steps * (
        width * (shape.trunk + shape.table) + rows * (prompt + answer / 2) * kv_bytes(shape, work.layout.residual)
    )
    cost.tokens += answers * answer


def _score(
    seen: Following, cost: Cost, models: list[Model], count: float, samples: int, prompts: Records, new: int
) -> None:
    """Adds one pass of each model over prompts with their answers."""
    prompt, answer = prompts.prompt or seen.wishes.prompt, _answer(prompts, new)
    pairs = count * operations.pairs([prompt]) + count * samples * operations.pairs([answer], before=prompt)
    for model in models:
        scored = 0.0 if model.scalar else count * samples * answer
        cost.computed += operations.forward(model, count * (prompt + samples * answer), pairs, scored)


def _watching(seen: Following, row: Row, start: Model) -> tuple[Model, ...]:
    """Frozen models that look at `dev`: the policy that the row starts from and reward models."""
    if not row.inputs.get("dev"):
        return ()
    proxies = [] if row.stage in ("ppo",) else seen.many(row, "reward")
    return (start, *proxies, *seen.many(row, "heldout_reward"))


def _look(
    seen: Following, cost: Cost, work: Work, row: Row, model: Model, watching: tuple[Model, ...], new: int,
    samples: int, drawing: Drawing,
) -> None:  # fmt: skip
    config: Any = row.config
    dev, looks = seen.read(row, "dev"), config.train.evaluations
    if dev.count is None:
        seen.notes.append("looks at dev are left out: nobody has counted its prompts")
        return
    _draw(seen, cost, work, model, looks * dev.count, samples, dev, new, drawing)
    _score(seen, cost, [model, *watching], looks * dev.count, samples, dev, new)


def ppo_work(
    config: Any,
    layout: Layout,
    trained: tuple[Model, ...],
    frozen: tuple[Model, ...],
    *,
    count: int,
    columns: int,
    longest: int,
    scored: float,
    looks: bool,
) -> Work:
    """What decides the memory of a PPO row with these settings.

    count      prompts an iteration; columns: tokens of the longest prompt with an answer
    longest    tokens of the longest prompt with all of its answers
    scored     share of answers among tokens
    """
    samples, engine, train = config.sampling.samples, config.engine, config.train
    drawing = Drawing(
        min(engine.rows, -(-count * samples // layout.ranks)),
        columns,
        engine.cache_gib * CACHE,
        config.sampling.max_new_tokens,
        half=engine.precision == "bfloat16",
        stays=True,
    )
    in_a_pass = -(-max(1, config.minibatch // samples) // layout.ranks) * longest
    return Work(
        layout=layout,
        trained=trained,
        frozen=frozen,
        token_budget=train.token_budget,
        longest=longest,
        in_a_pass=in_a_pass if in_a_pass < train.token_budget else None,
        scored=scored,
        checkpointing=train.checkpointing,
        entropy=True,
        exact_kl=config.kl.where == "loss" and config.kl.estimator == "exact",
        shared=True,
        drawing=drawing,
        asks=True,
        saves=bool(train.checkpoint_every),
        snapshots=bool(train.checkpoint_every) and config.iterations > train.checkpoint_every,
        best=looks,
    )


def _ppo(seen: Following, row: Row) -> tuple[Work, Cost]:
    config: Any = row.config
    start, rewards = seen.one(row, "policy"), seen.many(row, "reward")
    assert start is not None
    policy = adapted(row, start, config.adapter)
    seen.models |= {f"{row.name}.policy": policy.saved(), f"{row.name}.average": policy.saved()}
    critic = None
    if config.has_critic and config.critic.start != "shared":
        first = rewards[0] if config.critic.start == "reward" and rewards else start
        critic = adapted(row, first, config.adapter, scalar=True)
        critic = critic if critic.adapter else replace(critic, base=f"{row.name}.critic")
    trained = (policy, critic) if critic else (policy,)
    reference = start if config.reference.kind == "start" else replace(policy, base=f"{row.name}.reference")
    if config.adapter and config.reference.kind == "start" and not config.adapter.keeps_start:
        reference = policy  # as it is before the first update
    average = (replace(policy, base=f"{row.name}.average"),) if config.average else ()
    watching = _watching(seen, row, start)
    prompts, samples, new = seen.read(row, "prompts"), config.sampling.samples, config.sampling.max_new_tokens
    prompt, answer = _prompt(seen, row, prompts, new), _answer(prompts, new)
    longest = (prompts.longest or config.max_tokens) - (0 if prompts.longest else new) + samples * new
    count = min(config.prompts, prompts.count or config.prompts)
    work = ppo_work(
        config,
        seen.layout(config.train.precision, config.train.optimizer),
        trained,
        (reference, *average, *rewards, *watching),
        count=int(count),
        columns=_columns(row, prompts, new),
        longest=int(longest),
        scored=samples * answer / (prompt + samples * answer),
        looks=bool(row.inputs.get("dev")),
    )
    cost = Cost()
    rounds = config.iterations
    assert work.drawing is not None
    _draw(seen, cost, work, policy, rounds * count, samples, prompts, new, work.drawing)
    _score(
        seen, cost, [*rewards, policy, reference, *([critic] if critic else [])], rounds * count, samples, prompts, new
    )
    learnt = rounds * config.epochs * count  # prompts with their answers
    tokens, scored = learnt * (prompt + samples * answer), learnt * samples * answer
    pairs = learnt * (operations.pairs([prompt]) + samples * operations.pairs([answer], before=prompt))
    learning = rounds - (config.critic.warmup if config.has_critic else 0)
    updates = max(0, learning) * config.epochs * -(-int(count) // max(1, config.minibatch // samples))
    for slot, weight in (("documents", config.mix.pretraining), ("conversations", config.mix.sft)):
        if weight:
            mixed, length = updates * config.mix.batch, _length(seen, row, seen.read(row, slot))
            tokens, scored = tokens + mixed * length, scored + mixed * length
            pairs += mixed * operations.pairs([length])
    for model in trained:
        cost.computed += operations.update(
            model, tokens, pairs, 0.0 if model.scalar else scored, recomputed=config.train.checkpointing
        )
    cost.tokens += tokens
    if row.inputs.get("dev"):
        _look(seen, cost, work, row, policy, watching, new, samples, work.drawing)
    return work, cost


def _rejection(seen: Following, row: Row) -> tuple[Work, Cost]:
    config: Any = row.config
    start, rewards = seen.one(row, "policy"), seen.many(row, "reward")
    prompts, new = seen.read(row, "prompts"), config.sampling.max_new_tokens
    samples = config.sampling.samples * max(1, len(config.temperatures))
    count = config.prompts or prompts.count
    if count is not None and prompts.count is not None:
        count = min(count, prompts.count)
    draws = bool(row.inputs.get("prompts"))
    prompt, answer = _prompt(seen, row, prompts, new), _answer(prompts, new)
    mined = {"all": samples * (samples - 1) // 2, "adjacent": samples - 1}.get(config.pairs.by, 1)
    mined = min(mined, config.pairs.per_prompt or mined)
    each = {"best": 1.0, "fraction": config.choose.fraction * samples}.get(config.choose.by, samples)
    written = {"conversations": (each, prompt + answer), "comparisons": (mined, prompt + 2 * answer)}
    for slot, (one, tokens) in written.items():
        known = None if count is None else count * one
        seen.records[f"{row.name}.{slot}"] = Records(known, tokens, prompt, prompts.longest)
    precision = config.train.precision if config.train else "fp32"
    layout = seen.layout(precision)
    cost = Cost()
    work = Work(
        layout=layout,
        guests=(*rewards, *([start] if start and not config.train else [])),
        token_budget=config.token_budget,
        longest=_columns(row, prompts, new),
    )
    if start and config.train:
        policy = adapted(row, start, config.adapter)
        seen.models[f"{row.name}.policy"] = policy.saved()
        work, cost = _training(
            seen,
            row,
            policy,
            seen.records[f"{row.name}.conversations"],
            guests=tuple(rewards),
            frozen=_watching(seen, row, start),
        )
    if draws and start:
        drawing = Drawing(
            min(config.engine.rows, config.engine.rows if count is None else int(count * samples)),
            _columns(row, prompts, new), config.engine.cache_gib * CACHE, new,
            half=config.engine.precision == "bfloat16",
        )  # fmt: skip
        work = replace(work, drawing=drawing, draws_first=bool(config.train), asks=True)
        per = count
        if per is None:
            seen.notes.append("sampling is left out: nobody has counted the prompts; set prompts")
        else:
            _draw(seen, cost, work, start, per, samples, prompts, new, drawing)
            _score(seen, cost, rewards, per, samples, prompts, new)
    return work, cost


def _read_far(seen: Following, cost: Cost, models: list[Model], row: Row) -> None:
    """Adds one pass of each model over the texts of `evaluate.context`: those with a pass key, and documents."""
    context, documents = row.config.context, seen.read(row, "documents")  # type: ignore[attr-defined]
    texts = [(context.depths * context.trials, length, context.words) for length in context.passkey]
    if documents.count and documents.tokens:
        length = min(documents.tokens, context.max_tokens)
        texts.append((documents.count * documents.tokens / length, length, length))
    for model in models:
        for count, length, scored in texts:
            pairs = count * operations.pairs([length])
            cost.computed += operations.forward(model, count * length, pairs, count * scored)


def _evaluate(seen: Following, row: Row) -> tuple[Work, Cost]:
    config: Any = row.config
    policies = seen.many(row, "policies")
    reference = seen.one(row, "reference") or policies[0]
    rewards = [*seen.many(row, "reward"), *seen.many(row, "heldout_reward")]
    prompts, new = seen.read(row, "prompts"), config.max_new_tokens
    _prompt(seen, row, prompts, new)
    largest = max(policies, key=lambda m: m.whole)
    beside: tuple[Model, ...] = (reference, *rewards)
    if not seen.device.on_cpu:  # where they take turns, and lie in CPU memory meanwhile
        beside = max((reference,), tuple(rewards), key=lambda models: sum(m.whole for m in models))
    count = config.prompts if prompts.count is None else min(config.prompts or prompts.count, prompts.count)
    rows = ROWS if count is None else min(ROWS, int(count * max(config.samples, config.best_of)))
    drawing = Drawing(rows, _columns(row, prompts, new), CACHE, new)
    work = Work(
        layout=Layout(on_cpu=seen.device.on_cpu, frozen="whole" if seen.device.on_cpu else "offloaded"),
        frozen=beside,
        guests=(largest,),
        token_budget=config.token_budget,
        longest=_columns(row, prompts, new),
        drawing=drawing,
        asks=True,
    )
    cost = Cost()
    if config.context:
        work = replace(work, longest=max(work.longest, config.context.max_tokens, *config.context.passkey))
        _read_far(seen, cost, [*policies, *[reference] * len(config.context.untrained)], row)
    if count is None:
        seen.notes.append("nobody has counted its prompts: set prompts")
        return work, cost
    for policy in policies:
        _draw(seen, cost, work, policy, count, config.samples, prompts, new, drawing)
        _score(seen, cost, [policy, reference, *rewards], count, config.samples, prompts, new)
    if config.best_of > 1:
        _draw(seen, cost, work, reference, count, config.best_of, prompts, new, drawing)
        _score(seen, cost, rewards, count, config.best_of, prompts, new)
    return work, cost


STAGES: dict[str, Callable[[Following, Row], tuple[Work, Cost]]] = {
    "pretrain": _pretrain,
    "sft": _sft,
    "reward": _reward,
    "ppo": _ppo,
    "rejection": _rejection,
    "dpo": _dpo,
    "evaluate": _evaluate,
}
