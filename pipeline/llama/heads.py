"""What is computed from a forest: log-probs and entropies by token, scores by state.

    PolicyModel(lm)                  log-prob of each chosen token given its predictor
    ScalarModel(classifier)          the scalar head at every token's own position: rewards and values
    ActorCritic(policy, value)       both, with one forward and one engine

Every model takes its hidden states from `hidden_states`, which runs a token forest on families whose attention has
been tried and rows padded on the right on all others and where an adapter has virtual tokens, with the same results.
Models wrapped by peft are run with their active adapters.

Shapes: T tokens, S segments, D hidden, B rows and L columns of the padded computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.forest import Forest
from pipeline.llama import attention, virtual
from pipeline.llama.logprobs import token_kl, token_logprobs
from pipeline.llama.options.windows import prompt_lengths


class TokenOutputs(NamedTuple):
    """A tuple, so that engines (DDP, ZeRO) find the tensors in it. None where not asked for."""

    logprobs_T: Tensor | None = None  # float32, 0 where the token was not chosen or nothing precedes it
    entropy_T: Tensor | None = None  # float32, nats, of the distribution that each chosen token was drawn from
    correct_T: Tensor | None = None  # float32, 1 where the chosen token was the likeliest
    values_T: Tensor | None = None  # float32, value of the state that predicts each token, 0 where none does
    kl_T: Tensor | None = None  # float32, nats, exact KL to the reference of the same distribution
    states_TD: Tensor | None = None  # hidden states, for a reference that others are compared with


def unwrapped(model: Any) -> Any:
    """The transformers model inside a peft wrapper, its adapter layers in place. Virtual tokens stay outside."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_states(model: nn.Module, forest: Forest, *, padded: bool | None = None) -> Tensor:
    """Last hidden states [T, D] of a causal LM or classifier. `padded` forces the choice of computation."""
    return _filled_states(model, forest, padded)[: len(forest)]


def _filled_states(model: nn.Module, forest: Forest, padded: bool | None = None) -> Tensor:
    """The same with filling behind: a head applied before it is cut off meets few different shapes."""
    inner = unwrapped(model)
    trunk = inner.base_model  # without the head
    if padded is None:
        padded = not attention.use_forest(model)
    elif not padded and not attention.use_forest(model):
        raise ValueError(
            f"{inner.config.model_type}: forest attention has not been tried on this family, or not with virtual tokens"
        )
    if not padded:
        return trunk(**attention.forest_inputs(forest)).last_hidden_state[0]
    rows = padded_rows(forest)
    prompts = _prompts(rows, forest) if getattr(inner.config, "prefix_attention", False) else None
    inputs = virtual.with_tokens(model, rows.ids_BL, rows.mask_BL, rows.positions_BL, prompts)
    states = trunk(**inputs, use_cache=False).last_hidden_state[:, -rows.ids_BL.shape[1] :]
    return states[rows.row_T, rows.column_T]


class PaddedRows(NamedTuple):
    """One row for each path from a root to a leaf; tokens shared by several paths are read from one of them."""

    ids_BL: Tensor
    mask_BL: Tensor
    positions_BL: Tensor
    row_T: Tensor
    column_T: Tensor


def padded_rows(forest: Forest) -> PaddedRows:
    if "padded" not in forest.cache:
        forest.cache["padded"] = _make_padded(forest)
    return forest.cache["padded"]


def _make_padded(forest: Forest) -> PaddedRows:
    start, length, parent = (x.tolist() for x in (forest.start_S, forest.length_S, forest.parent_S))
    paths: list[np.ndarray] = []
    inner = set()
    for s, up in enumerate(parent):
        own = np.arange(start[s], start[s] + length[s])
        paths.append(np.concatenate((paths[up], own)) if up >= 0 else own)
        while length[s] and up >= 0:  # every ancestor's tokens are in this row
            inner.add(up)
            up = parent[up]
    leaves = [paths[s] for s in range(len(parent)) if length[s] and s not in inner]
    width = max((len(p) for p in leaves), default=1)
    slots = np.full((len(leaves), width), -1, dtype=np.int64)
    row, column = np.zeros(len(forest), np.int64), np.zeros(len(forest), np.int64)
    for r, path in enumerate(leaves):
        slots[r, : len(path)] = path
        row[path], column[path] = r, np.arange(len(path))
    at = torch.from_numpy(slots).to(forest.ids_T.device)
    mask = at >= 0
    columns = torch.arange(width, device=at.device).expand(len(leaves), -1)
    device = at.device
    return PaddedRows(
        ids_BL=torch.where(mask, forest.ids_T[at.clamp(min=0)], 0),
        mask_BL=mask.long(),
        positions_BL=columns,
        row_T=torch.from_numpy(row).to(device),
        column_T=torch.from_numpy(column).to(device),
    )


def _prompts(rows: PaddedRows, forest: Forest) -> Tensor:
    """[B]: the tokens of each row's prompt."""
    found = torch.zeros(len(rows.ids_BL), dtype=torch.int64, device=rows.row_T.device)
    return found.index_copy(0, rows.row_T, prompt_lengths(forest)[forest.segment_T])


def _spread(values: Tensor, at: Tensor, size: int) -> Tensor:
    """[N] values -> [T], 0 elsewhere."""
    return torch.zeros(size, dtype=values.dtype, device=values.device).index_copy(0, at, values)


class Compared(NamedTuple):
    """A reference's states of a forest and its head, for the exact KL."""

    states_TD: Tensor
    head: Any


class PolicyModel(nn.Module):
    """Log-probs of tokens under a causal LM, also a peft-wrapped or foreign one."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    @property
    def head(self) -> Any:
        return unwrapped(self.lm).get_output_embeddings()

    def forward(self, forest: Forest, *, states: bool = False, **options: Any) -> TokenOutputs:
        """`read` of the model's hidden states; `states` gives those too."""
        found = _filled_states(self.lm, forest)
        out = self.read(found, forest, **options)
        return out._replace(states_TD=found[: len(forest)]) if states else out

    def read(
        self,
        states: Tensor,
        forest: Forest,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        accuracy: bool = False,
        select_T: Tensor | None = None,
        compared: Compared | None = None,
    ) -> TokenOutputs:
        """Chosen tokens default to those with a weight. A token that nothing precedes has log-prob 0."""
        chosen = forest.weights_T != 0 if select_T is None else select_T
        at = (chosen & (forest.predictor_T >= 0)).nonzero().squeeze(1)
        vocabulary = unwrapped(self.lm).config.get_text_config().vocab_size
        predicting = states.index_select(0, forest.predictor_T[at])
        found = token_logprobs(
            predicting,
            self.head,
            forest.ids_T[at],
            vocabulary,
            temperature=temperature,
            entropy=entropy,
            accuracy=accuracy,
        )
        out = TokenOutputs(*(None if values is None else _spread(values, at, len(forest)) for values in found))
        if compared is None:
            return out
        theirs = compared.states_TD.index_select(0, forest.predictor_T[at])
        kl = token_kl(predicting, self.head, theirs, compared.head, vocabulary, temperature=temperature)
        return out._replace(kl_T=_spread(kl, at, len(forest)))


class ScalarModel(nn.Module):
    """The scalar head of a sequence classifier at every position, and a constant `shift` on top of it."""

    def __init__(self, classifier: nn.Module, shift: float = 0.0) -> None:
        super().__init__()
        self.classifier = classifier
        self.shift = shift

    def forward(self, forest: Forest) -> Tensor:
        """float32 [T]: the head's output at each token's own position, the state after reading that token."""
        scores = unwrapped(self.classifier).score(_filled_states(self.classifier, forest)).squeeze(-1).float()
        return scores[: len(forest)] + self.shift if self.shift else scores[: len(forest)]


def at_predictor(values_T: Tensor, forest: Forest) -> Tensor:
    """[T]: the value of the state that predicts each token, 0 where nothing precedes."""
    predictor = forest.predictor_T
    return values_T.index_select(0, predictor.clamp(min=0)).masked_fill(predictor < 0, 0.0)


def at_last(values_T: Tensor, forest: Forest) -> Tensor:
    """[S]: the value at the last real token of each segment's path, 0 for an empty path."""
    last = forest.last_S
    return values_T.index_select(0, last.clamp(min=0)).masked_fill(last < 0, 0.0)


class ValueHead(nn.Module):
    """A value from a policy's own hidden states: a critic without a trunk.

    Normal with standard deviation 1 / sqrt(d + 1), no bias (as `new_classifier`); the same for the same seed.
    """

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.score = nn.Linear(width, 1, bias=False)
        with torch.no_grad():
            self.score.weight.normal_(0.0, (width + 1) ** -0.5, generator=generator)

    def forward(self, states: Tensor) -> Tensor:
        return self.score(states).squeeze(-1).float()


class ActorCritic(nn.Module):
    """Policy and value model in one container, so that one engine and one optimiser see both.

    value    a model of its own (two trunks), a `ValueHead` on the policy's trunk, or None
    Nothing inside is called from outside but through `forward`; generation uses `.policy.lm`.
    """

    def __init__(self, policy: PolicyModel, value: ScalarModel | ValueHead | None) -> None:
        super().__init__()
        self.policy = policy
        self.value = value

    def forward(
        self,
        forest: Forest,
        want: Sequence[str] = ("logprobs", "entropy", "values"),
        *,
        detached: bool = False,
        **options: Any,
    ) -> TokenOutputs:
        """`options` are those of `PolicyModel.read`. `values_T` are gathered by predictor: the value of the state in
        which each token was chosen; `detached` keeps the gradient of a head's values out of the trunk."""
        unknown = set(want) - {"logprobs", "entropy", "values"}
        if unknown:
            raise ValueError(f"want: {sorted(unknown)} are none of logprobs, entropy, values")
        shared = isinstance(self.value, ValueHead) and "values" in want
        states = _filled_states(self.policy.lm, forest) if shared else None
        out = TokenOutputs()
        if "logprobs" in want or "entropy" in want:
            options |= {"entropy": "entropy" in want}
            out = self.policy(forest, **options) if states is None else self.policy.read(states, forest, **options)
        if "values" in want and self.value is not None:
            values = self.value(forest if states is None else states.detach() if detached else states)
            out = out._replace(values_T=at_predictor(values[: len(forest)], forest))
        return out
