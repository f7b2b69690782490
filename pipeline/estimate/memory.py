"""Memory of one rank by hand: what a row's models, updates, answers and looks hold at once, in bytes.

    zero(7e9, ranks=8, stage=2)             26.25e9: states of a 7B model in mixed precision (Rajbhandari et al. 2020)
    peak(work, tokens=8192) -> Peak         the largest phase of a row, part by part
    largest_budget(work, room) -> int       the most tokens a pass that fit, 0 where none do

Activations are counted as this project's layers keep them for their backward pass, in the manner of Korthikanti et al.
(2022, section 4): one number for each element that autograd or a hand-written function saves. What is counted beside
them is what tests/benchmarks/estimate.py found in processes on a CPU; of GPUs the counts are the code's, the fixed part
is an assumption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from pipeline.estimate.shape import Model, Shape, kv_bytes
from pipeline.llama.quantise_settings import Int8Settings, Nf4Settings

MB = 1e6
# Python with PyTorch, transformers, accelerate and peft, measured; a CUDA context, its libraries and NCCL's buffers.
FIXED = {"cpu": 480 * MB, "cuda": 1200 * MB}
# Held by the allocator beyond what was asked for: pieces between blocks that no later block fits into.
SLACK = {"cpu": 1.05, "cuda": 1.05}
# The same of a CPU's heap where adapters pass tensors on to each other: beside 470 MB in use at a step of SFT another
# 350 MB lay free (mallinfo2). Fitted on the rows of tests/benchmarks/estimate.py with LoRA, NF4 and int8.
ADAPTED_SLACK = 1.5
BUCKET = 5e8  # elements of DeepSpeed's reduce_bucket_size
CHUNK = 1 << 24  # logits held at once (pipeline/llama/logprobs.py)
IN_ONE_UP_TO = 1024  # hidden size up to which a CPU decodes in one call (pipeline/llama/decode.py)
SHORT = 384  # keys up to which attention without the kernel keeps its weights (pipeline/llama/attention.py)
PREFILL = 4096  # prompt tokens that enter at once (pipeline/rollout/native.py)
FOREST = 100  # bytes a token of ids, positions, weights and their like
MOST = 1 << 20  # tokens a pass beyond which nobody asks


class Widths(NamedTuple):
    """Bytes a parameter: the weights that products read, gradients, and what the optimiser alone keeps."""

    weights: float
    gradients: float
    optimiser: float


MIXED = Widths(2, 2, 12)  # 16-bit weights and gradients; float32 weights and both moments (Rajbhandari 2020, 3.1)
SINGLE = Widths(4, 4, 8)  # float32 weights, which autocast reads too; both moments
FEW = {"int8": 1.0, "nf4": 0.5 + 0.127 / 8}  # bytes a quantised weight (Dettmers et al. 2023, section 3)
UNDOUBLED = 4 / 64 - 0.127 / 8  # more where the scales of nf4 are float32
MOMENTS = {"adamw": 8.0, "adamw8bit": 2 + 8 / 256, "adafactor": 0.0}  # a float32 weight; rows and columns are nothing


@dataclass(frozen=True)
class States:
    """Of one rank. `host`: what offload keeps in CPU memory."""

    weights: float
    gradients: float
    optimiser: float
    host: float = 0.0

    @property
    def device(self) -> float:
        return self.weights + self.gradients + self.optimiser


def states(
    parameters: float, *, ranks: int = 1, stage: int = 0, widths: Widths = MIXED, offload: str = "none"
) -> States:
    """Stage 1 cuts the optimiser's states over the ranks, 2 gradients too, 3 weights too (Rajbhandari et al. 2020,
    section 5). Offload: the optimiser's states and, from stage 2 on, gradients lie in CPU memory (Ren et al. 2021);
    `all`: weights too (Rajbhandari et al. 2021).
    """
    weights, gradients, optimiser = (
        width * parameters / (ranks if stage >= least else 1) for width, least in zip(widths, (3, 2, 1), strict=True)
    )
    if offload == "none":
        return States(weights, gradients, optimiser)
    moved = optimiser + (gradients if stage >= 2 else 0.0) + (weights if offload == "all" else 0.0)
    return States(0.0 if offload == "all" else weights, gradients if stage < 2 else 0.0, 0.0, moved)


def zero(parameters: float, *, ranks: int, stage: int) -> float:
    """Bytes of model states a rank under mixed-precision Adam.

    >>> [zero(7, ranks=8, stage=stage) for stage in range(4)]
    [112.0, 38.5, 26.25, 14.0]
    """
    return states(parameters, ranks=ranks, stage=stage).device


@dataclass(frozen=True)
class Layout:
    """How a row's ranks hold its models. `stage`: ZeRO's; FSDP is 3 of float32 weights."""

    ranks: int = 1
    strategy: str = "single"
    stage: int = 0
    offload: str = "none"
    frozen: str = "whole"
    half: bool = False
    on_cpu: bool = True
    optimizer: str = "adamw"

    @property
    def deepspeed(self) -> bool:
        return self.strategy == "deepspeed"

    @property
    def widths(self) -> Widths:
        return MIXED if self.deepspeed and self.half else SINGLE._replace(optimiser=MOMENTS[self.optimizer])

    @property
    def number(self) -> int:
        """Bytes of a number in products."""
        return 2 if self.half else 4

    @property
    def residual(self) -> int:
        """Bytes of a number between layers: autocast leaves it in float32."""
        return 2 if self.half and self.deepspeed else 4

    @property
    def autocast(self) -> bool:
        return self.half and not self.deepspeed

    @property
    def joined(self) -> bool:
        """Whether layers may stack the weights of neighbours: not those that are whole only inside a call."""
        return not (self.deepspeed and self.stage == 3)


@dataclass(frozen=True)
class Drawing:
    """How a row draws answers: most sequences at once, columns of each, most bytes of their cache, and whether the
    cache stays while the row learns."""

    rows: int
    columns: int
    cache: float
    new: int
    half: bool = False
    stays: bool = False


@dataclass(frozen=True)
class Work:
    """What decides a row's memory.

    trained     models with gradients; frozen: beside them all the time; guests: only while the row draws or scores
    longest     tokens of the longest record, which a pass must hold
    in_a_pass   most tokens that a pass can have, whatever the budget; None where batches hold more than a budget
    scored      share of tokens whose log-probs are asked for
    """

    layout: Layout
    trained: tuple[Model, ...] = ()
    frozen: tuple[Model, ...] = ()
    guests: tuple[Model, ...] = ()
    token_budget: int = 8192
    longest: int = 1
    in_a_pass: int | None = None
    scored: float = 1.0
    checkpointing: bool = False
    entropy: bool = False
    exact_kl: bool = False
    shared: bool = False  # frozen weights of one base are held once
    draws_first: bool = False  # answers are drawn and scored before there is anything of training but the model
    drawing: Drawing | None = None
    asks: bool = False  # passes without gradients: targets, scores, held-out records
    saves: bool = True  # a checkpoint at the end, copied before it is written
    snapshots: bool = False  # and others while updates go on
    best: bool = False  # a copy of the best weights so far

    @property
    def tokens(self) -> int:
        """Of the fullest pass."""
        return min(self.token_budget, self.in_a_pass or self.token_budget)


@dataclass(frozen=True)
class Peak:
    """The phase that holds most, its parts in bytes, and what lies in CPU memory beside a device's."""

    phase: str
    parts: Mapping[str, float]
    host: float = 0.0
    phases: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())


# ------------------------------------------------------------------------------------------------------- a forward pass


def kept(model: Model, layout: Layout, longest: int) -> float:
    """Bytes that a decoder layer keeps for the backward pass, a token.

    Both inputs of norms stay between layers; then what products, attention and the gate read again: with the compiled
    kernel queries, keys and values once, without it their gathered copies and the weights of short segments.
    """
    shape, b, r = model.shape, layout.number, layout.residual
    hidden, inner, queries, keys = shape.hidden, shape.active * shape.inner, shape.queries, shape.keys
    of_norms = 2 * (r * hidden + 4)
    targets = model.targets
    into = [{"q_proj", "k_proj", "v_proj"} & targets, {"gate_proj", "up_proj"} & targets]
    if model.adapter and layout.autocast:
        copies = sum(map(len, into))  # each adapter casts its input by itself
    else:
        copies = sum(bool(group) for group in into) + (layout.autocast and not layout.on_cpu and bool(into[1]))
    attended = b * (queries + 2 * keys) + b * queries
    if layout.on_cpu:
        attended += 8 * shape.heads
    else:
        attended += b * (queries + shape.heads * min(longest, SHORT))
    if model.adapter and layout.autocast and "o_proj" in targets:
        attended += b * queries
    gated = b * inner * (2 if layout.on_cpu else 3) + (b * inner if "down_proj" in targets else 0)
    ranks = b * model.rank * len(targets)
    return of_norms + copies * b * hidden + attended + gated + ranks


def copied_weights(model: Model, layout: Layout) -> float:
    """Bytes of weights that a layer's products keep in another form until the backward pass: cast, or stacked."""
    shape = model.shape
    if model.quantise:
        return 0.0
    if layout.autocast:
        return 2.0 * shape.layer_matrices
    if model.adapter or not layout.joined:
        return 0.0
    stacked = (shape.queries + 2 * shape.keys) * shape.hidden
    if layout.on_cpu:
        stacked += 2 * shape.inner * shape.hidden
    return float(layout.number * stacked)


def between(model: Model, layout: Layout, tokens: float) -> float:
    """Bytes of the gradients of one layer's activations and of its largest product, while they are computed."""
    shape, b = model.shape, layout.number
    gates = 6 if model.adapter else 3  # an adapter's product, its scaled sum and the stacked gates each pass once more
    passing = tokens * (gates * b * shape.active * shape.inner + (4 + layout.residual) * shape.hidden)
    product = 0.0 if model.adapter else (b if layout.half else 0) + 4
    restored = 4.0 * max(a * b for a, b in shape.projections.values()) if model.quantise else 0.0
    if isinstance(model.quantise, Int8Settings):
        passing += tokens * _whole_numbers(shape)
    return passing + product * 2 * shape.inner * shape.hidden + restored


def _whole_numbers(shape: Shape) -> float:
    """Bytes a token of the largest product over int8 weights: whole numbers, and what they are worth."""
    return 3 * 4.0 * shape.inner


def activations(model: Model, layout: Layout, tokens: float, *, checkpointing: bool, longest: int) -> float:
    """Bytes at the end of a forward pass below the head, with what the last layer's backward pass works with."""
    shape = model.shape
    layer = tokens * kept(model, layout, longest) + copied_weights(model, layout)
    inputs = tokens * layout.residual * shape.hidden
    below = shape.layers * inputs + layer if checkpointing else shape.layers * layer
    return below + tokens * ((layout.residual + 4) * shape.hidden + FOREST)


def answering(model: Model, layout: Layout, tokens: float) -> float:
    """Bytes of a pass without gradients: the states between layers, and one layer at work."""
    shape, b = model.shape, layout.number
    states_between = tokens * layout.residual * shape.hidden * (shape.layers + 1)
    at_work = tokens * (4 * shape.hidden + 3 * b * shape.active * shape.inner + FOREST)
    return states_between + at_work + copied_weights(model, layout)


def logits(
    shape: Shape, layout: Layout, scored: float, *, entropy: bool = False, exact_kl: bool = False
) -> tuple[float, float]:
    """Bytes while log-probs are computed, and of them what stays until the backward pass: float32 log-probs over the
    vocabulary of `scored` positions, or of one chunk of them, which is computed again."""
    rows = max(1, CHUNK // shape.vocabulary)
    n = min(scored, rows)
    wide = 10.0 if layout.half else 12.0 if entropy else 8.0
    held = n * shape.vocabulary * (28.0 if exact_kl else wide)
    cast = 2.0 * shape.table if layout.autocast else 0.0
    read = scored * (4 + (layout.number if layout.autocast else 0)) * shape.hidden
    stays = 4.0 * n * shape.vocabulary if scored <= rows else 0.0
    return held + cast + read, stays + cast + read


# ------------------------------------------------------------------------------------------------------- what is whole


def below(model: Model) -> float:
    """Bytes of what lies below a model's adapter: float32, or few bits in the products of its layers."""
    if model.quantise is None:
        return 4.0 * model.whole
    few = FEW[model.quantise.kind]
    if isinstance(model.quantise, Nf4Settings) and not model.quantise.double:
        few += UNDOUBLED
    return 4.0 * (model.whole - model.shape.trunk) + few * model.shape.trunk


def whole_weights(models: Sequence[Model], shared: bool) -> float:
    """Bytes of frozen models; `shared`: one base held once (pipeline.llama.adapters.share_frozen)."""
    own = 4.0 * sum(model.own for model in models)
    if not shared:
        return sum(map(below, models)) + own
    bases: dict[str, float] = {}
    for model in models:
        bases[model.base] = max(bases.get(model.base, 0.0), below(model))
    return sum(bases.values()) + own


def _resident(work: Work, whole: str) -> float:
    """Bytes of frozen weights of a rank: what adapters leave frozen of the trained models, and other models. Of those,
    only `whole` ("policies", "scalars", "all" or "none") are not parked (pipeline/train/parked.py).
    """
    layout = work.layout
    bare = [replace(m, adapter=None) for m in work.trained if m.adapter]
    engine = layout.deepspeed or layout.strategy == "fsdp"  # holds what is below adapters with them
    mine = whole_weights(bare, work.shared and not engine)
    mine += 4.0 * sum(m.whole - m.trained for m in work.trained if m.patterns)
    beside = bare if work.shared and not engine else []
    others = whole_weights([*beside, *work.frozen], work.shared) - whole_weights(beside, work.shared)
    in_use = [m for m in work.frozen if whole == "all" or m.scalar == (whole == "scalars")] if whole != "none" else []
    used = whole_weights([*beside, *in_use], work.shared) - whole_weights(beside, work.shared)
    if engine:
        width = 0.0 if layout.offload == "all" else layout.widths.weights / (layout.ranks if layout.stage == 3 else 1)
        mine *= width / 4
    return mine + used + (others - used) * _share(layout)


def cache_rows(drawing: Drawing, shape: Shape, width: float) -> int:
    columns = -(-drawing.columns // 16) * 16
    return max(1, min(drawing.rows, int(drawing.cache // (kv_bytes(shape, width) * columns))))


def cache_bytes(drawing: Drawing, shape: Shape, width: float) -> float:
    """Keys and values of all rows that are decoded at once."""
    columns = -(-drawing.columns // 16) * 16
    return cache_rows(drawing, shape, width) * columns * kv_bytes(shape, width)


def decoding(model: Model, layout: Layout, drawing: Drawing) -> float:
    """Bytes of sampling beside weights and cache: joined and laid-out copies of weights, prompts, a step's logits."""
    shape, width = model.shape, layout.residual
    rows = cache_rows(drawing, shape, width)
    copies = 0.0
    if model.adapter is None and layout.joined:
        copies = (
            shape.layers
            * (shape.queries + 2 * shape.keys + 2 * shape.inner)
            * shape.hidden
            * (2 if drawing.half else width)
        )
        if layout.on_cpu and shape.hidden <= IN_ONE_UP_TO and not drawing.half:
            copies += width * (shape.trunk + shape.table)
    prompts: float = (
        min(PREFILL, rows * drawing.columns) * (3 * shape.hidden + 3 * shape.inner + 2 * shape.queries) * width
    )
    if isinstance(model.quantise, Int8Settings):  # of gate and up, in rooms that the heap does not join (measured)
        prompts += min(PREFILL, rows * drawing.columns) * 2 * _whole_numbers(shape)
    step = rows * (4 * 4 * shape.vocabulary + 20 * drawing.new)
    return copies + prompts + step


# ------------------------------------------------------------------------------------------------------------- the row


def peak(work: Work, tokens: int | None = None) -> Peak:
    """The largest phase of a row whose fullest pass has `tokens` tokens."""
    tokens = work.tokens if tokens is None else tokens
    layout = work.layout
    moved = sum(model.trained for model in work.trained)
    held = states(moved, ranks=layout.ranks, stage=layout.stage, widths=layout.widths, offload=layout.offload)
    copies = _snapshots(work, moved)
    own = {"weights": held.weights, "optimiser": held.optimiser}
    together = _gathered(work)
    drawer = next((m for m in (*work.guests, *work.trained, *work.frozen) if not m.scalar), None)
    if any(not m.scalar for m in work.trained):
        drawer = next(m for m in work.trained if not m.scalar)
    cache = cache_bytes(work.drawing, drawer.shape, layout.residual) if work.drawing and drawer else 0.0
    staying = cache if work.drawing and work.drawing.stays else 0.0
    guests = whole_weights(work.guests, work.shared)
    frozen = {whole: _resident(work, whole) for whole in ("none", "policies", "scalars", "all")}
    opened = whole_weights((*work.trained, *work.frozen), False)
    phases: dict[str, dict[str, float]] = {}
    if work.trained:
        phases["starting"] = _starting(work, moved, opened)
        phases["updating"] = _updating(work, tokens, held) | {"frozen": frozen["none"], "cache": staying}
        saved = (4.0 + _written(layout) * (work.saves and not work.snapshots)) * moved if layout.on_cpu else 0.0
        phases["saving"] = own | {"frozen": frozen["none"], "whole": together, "copies": saved, "cache": staying}
    # Nothing trained: guests come one after another, each opened whole, beside its file.
    following = 0.0 if work.trained else 4.0 * max((m.whole for m in work.guests), default=0)
    if following and layout.on_cpu:
        phases["starting"] = {"frozen": frozen["all"], "guest": following, "file": following}
    while_drawn = own | {"frozen": frozen["scalars"], "guests": guests, "whole": together}
    if work.draws_first:
        while_drawn = {"weights": whole_weights(work.trained, False), "frozen": 0.0, "guests": guests, "whole": 0.0}
    if work.drawing and drawer:
        there = {"guests": 0.0} if work.draws_first else {}
        drawn = decoding(drawer, layout, work.drawing)
        phases["sampling"] = while_drawn | there | {"cache": cache, "decoding": drawn}
    if asked := [*work.guests, *(m for m in work.frozen if m.scalar)]:
        answer = max(_asked(m, work, tokens) for m in asked)
        phases["scoring"] = while_drawn | {"cache": staying, "answering": answer}
    if work.asks and (asked := [*work.trained, *(m for m in work.frozen if not m.scalar)]):
        phases["comparing"] = own | {
            "frozen": frozen["policies"], "guests": 0.0 if work.trained else guests, "cache": staying,
            "answering": max(_asked(m, work, tokens) for m in asked),
        }  # fmt: skip
    if not phases:
        return Peak("nothing", {"fixed": FIXED[_kind(layout)]})
    adapted = layout.on_cpu and any(m.adapter for m in (*work.trained, *work.frozen, *work.guests))
    slack = ADAPTED_SLACK if adapted else SLACK[_kind(layout)]
    for parts in phases.values():
        if layout.on_cpu:
            parts |= {"checkpoints": copies, "offloaded": held.host}
        parts["slack"] = (slack - 1) * sum(parts.values())
        parts["fixed"] = FIXED[_kind(layout)]
    totals = {name: sum(parts.values()) for name, parts in phases.items()}
    largest = max(totals, key=lambda name: totals[name])
    found = {name: size for name, size in phases[largest].items() if size}
    host = 0.0 if layout.on_cpu else max(opened + max(guests, 2 * following), held.host + copies)
    return Peak(largest, found, host, totals)


def _starting(work: Work, moved: float, opened: float) -> dict[str, float]:
    """Every model is opened whole, in float32 and in CPU memory, the last one beside its file. Then on the device, as
    pipeline/train/parked.py and the engines bring them there: what is parked comes in parts; what is not, one after
    another, bases that are shared once; ZeRO-3 brings trained models itself, cast, and cuts up what is there whole."""
    layout = work.layout
    if layout.on_cpu:
        return {"opened": opened, "file": 4.0 * max(m.whole for m in (*work.trained, *work.frozen))}
    itself = layout.deepspeed and layout.stage == 3
    parked = layout.frozen != "whole"
    parts = whole_weights(work.frozen, work.shared) * (_share(layout) if parked else 0.0)
    models = (*(() if itself else work.trained), *(() if parked else work.frozen))
    held = most = parts
    for number, model in enumerate(models, 1):
        most = max(most, held + whole_weights([model], False))
        held = parts + whole_weights(models[:number], work.shared)
    if itself:
        most = max(most, held + layout.widths.weights * sum(m.whole for m in work.trained))
    return {"opened": most, "cut": 4.0 * moved / layout.ranks if layout.stage else 0.0}


def _share(layout: Layout) -> float:
    """Of frozen weights that are parked, what a device holds between phases."""
    return {"sharded": 1 / layout.ranks, "offloaded": float(layout.on_cpu)}.get(layout.frozen, 1.0)


def _kind(layout: Layout) -> str:
    return "cpu" if layout.on_cpu else "cuda"


def _asked(model: Model, work: Work, tokens: float) -> float:
    """Bytes of a pass of this model without gradients."""
    below = answering(model, work.layout, tokens)
    return below if model.scalar else below + logits(model.shape, work.layout, work.scored * tokens)[0]


def _snapshots(work: Work, moved: float) -> float:
    """Copies of weights and moments that a checkpoint is written from, and of the best weights."""
    cut = work.layout.ranks if work.layout.stage else 1
    return moved * (_written(work.layout) * work.snapshots + 4.0 * work.best) / cut


def _written(layout: Layout) -> float:
    """Bytes of a trained weight and its moments in a checkpoint."""
    return 4.0 + MOMENTS[layout.optimizer]


def _updating(work: Work, tokens: int, held: States) -> dict[str, float]:
    layout = work.layout
    graphs = [
        activations(m, layout, tokens, checkpointing=work.checkpointing, longest=work.longest) for m in work.trained
    ]
    graph = sum(graphs)
    again = [tokens * kept(m, layout, work.longest) + copied_weights(m, layout) for m in work.trained]
    if work.checkpointing:  # of one model at a time is a layer whole again
        graph -= sum(again) - max(again)
    each = [between(m, layout, tokens) for m in work.trained]
    at_work = max(each)
    # A heap keeps the room of a layer that is computed again in pieces, and makes as much anew: what is in use is as
    # counted here, what the heap held beyond it was 0.5 to 3 times a layer at work, differently from run to run of the
    # same row. What adapters pass on to each other likewise.
    pieces = 0.0
    if layout.on_cpu and work.checkpointing:
        pieces = 1.3 * (sum(again) + at_work)
    elif layout.on_cpu and any(m.adapter for m in work.trained):
        pieces = sum(each)
    scored = [m for m in work.trained if not m.scalar]
    head, stays = 0.0, 0.0
    if scored:
        head, stays = logits(
            scored[0].shape, layout, work.scored * tokens, entropy=work.entropy, exact_kl=work.exact_kl
        )
        head -= sum(graphs[1:])  # log-probs are computed, and go back, without the critic's graph; they wait beside it
    parts = {
        "weights": held.weights,
        "gradients": held.gradients,
        "optimiser": held.optimiser,
        "exchange": _exchange(work),
        "pieces": pieces,
    }
    if work.in_a_pass is not None and work.in_a_pass <= work.token_budget and layout.ranks == 1:
        # One pass a step: gradients appear as the graph goes.
        early = graph + max(head, stays + at_work)
        late = held.gradients + graph / max(m.shape.layers for m in work.trained) + at_work
        parts["gradients"] = 0.0 if early >= late else held.gradients
        rest = early if early >= late else late - held.gradients
        return parts | {"activations": min(graph, rest), "logits": rest - min(graph, rest)}
    return parts | {"activations": graph, "logits": max(head, stays + at_work)}


def _exchange(work: Work) -> float:
    """Bytes of buffers in which ranks exchange gradients and weights."""
    layout, moved = work.layout, sum(m.trained for m in work.trained)
    if layout.ranks == 1 and not layout.deepspeed:
        return 0.0
    if layout.strategy == "ddp":
        return 4.0 * moved  # buckets beside the gradients
    shape = work.trained[0].shape
    if layout.deepspeed:
        bucket = min(BUCKET, moved) * layout.widths.gradients
        gathered = layout.widths.weights * (2 * shape.table + 2 * shape.layer_matrices) if layout.stage == 3 else 0.0
        return bucket + gathered
    # FSDP2 keeps embedding, head and norms whole between forward and backward, and works a layer ahead
    return 4.0 * sum((1 if m.shape.tied or m.scalar else 2) * m.shape.table for m in work.trained) + 12.0 * (
        shape.layer_matrices
    )


def _gathered(work: Work) -> float:
    """Bytes that make weights whole that lie cut over the ranks or in CPU memory: to sample from them, to save them."""
    layout = work.layout
    if layout.stage < 3 or (layout.ranks == 1 and layout.offload != "all"):
        return 0.0
    here = 0.0 if layout.offload == "all" else 1 / layout.ranks
    return layout.widths.weights * sum(m.parameters for m in work.trained) * (1 - here)


def largest_budget(work: Work, room: float) -> int:
    """The most tokens a pass that fit into `room` bytes, at most `MOST`; 0 where not even the longest record does."""
    free = replace(work, in_a_pass=None)
    least, most = max(1, work.longest), MOST
    if peak(free, least).total > room:
        return 0
    if peak(free, most).total <= room:
        return most
    while most - least > 1:
        middle = (least + most) // 2
        if peak(free, middle).total <= room:
            least = middle
        else:
            most = middle
    return least


def human(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
