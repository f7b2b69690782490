"""What is computed from a forest: log-probs and entropies by token, scores by state.

    PolicyModel(lm)                  log-prob of each chosen token given its predictor
    ScalarModel(classifier)          the scalar head at every token's own position: rewards and values
    ActorCritic(policy, value)       both, with one forward and one engine

Every model takes its hidden states from `hidden_states`, which runs a token forest on families whose attention has
been tried and rows padded on the right on all others, with the same results. Models wrapped by peft are run with
their active adapters.

Shapes: T tokens, S segments, D hidden, B rows and L columns of the padded computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.forest import Forest
from pipeline.llama import attention
from pipeline.llama.logprobs import token_logprobs


class TokenOutputs(NamedTuple):
    """A tuple, so that engines (DDP, ZeRO) find the tensors in it. None where not asked for."""

    logprobs_T: Tensor | None = None  # float32, 0 where the token was not chosen or nothing precedes it
    entropy_T: Tensor | None = None  # float32, nats, of the distribution that each chosen token was drawn from
    correct_T: Tensor | None = None  # float32, 1 where the chosen token was the likeliest
    values_T: Tensor | None = None  # float32, value of the state that predicts each token, 0 where none does


def unwrapped(model: Any) -> Any:
    """The transformers model inside a peft wrapper, its adapter layers in place. Prompt methods have none."""
    if not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ValueError("prompt-learning adapters add tokens of their own and cannot run on a forest: use LoRA")
    return model.get_base_model()


def hidden_states(model: nn.Module, forest: Forest, *, padded: bool | None = None) -> Tensor:
    """Last hidden states [T, D] of a causal LM or classifier. `padded` forces the choice of computation."""
    return _filled_states(model, forest, padded)[: len(forest)]


def _filled_states(model: nn.Module, forest: Forest, padded: bool | None = None) -> Tensor:
    """The same with filling behind: a head applied before it is cut off meets few different shapes."""
    inner = unwrapped(model)
    trunk = inner.base_model  # without the head
    if padded is None:
        padded = not attention.use_forest(inner)
    elif not padded and not attention.use_forest(inner):
        raise ValueError(f"{inner.config.model_type}: forest attention has not been tried on this family")
    if not padded:
        return trunk(**attention.forest_inputs(forest)).last_hidden_state[0]
    rows = padded_rows(forest)
    out = trunk(input_ids=rows.ids_BL, attention_mask=rows.mask_BL, position_ids=rows.positions_BL, use_cache=False)
    return out.last_hidden_state[rows.row_T, rows.column_T]


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


def _spread(values: Tensor, at: Tensor, size: int) -> Tensor:
    """[N] values -> [T], 0 elsewhere."""
    return torch.zeros(size, dtype=values.dtype, device=values.device).index_copy(0, at, values)


class PolicyModel(nn.Module):
    """Log-probs of tokens under a causal LM, also a peft-wrapped or foreign one."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(
        self,
        forest: Forest,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        accuracy: bool = False,
        select_T: Tensor | None = None,
    ) -> TokenOutputs:
        """Chosen tokens default to those with a weight. A token that nothing precedes has log-prob 0."""
        chosen = forest.weights_T != 0 if select_T is None else select_T
        at = (chosen & (forest.predictor_T >= 0)).nonzero().squeeze(1)
        inner = unwrapped(self.lm)
        states = _filled_states(self.lm, forest).index_select(0, forest.predictor_T[at])
        found = token_logprobs(
            states,
            inner.get_output_embeddings(),
            forest.ids_T[at],
            inner.config.get_text_config().vocab_size,
            temperature=temperature,
            entropy=entropy,
            accuracy=accuracy,
        )
        return TokenOutputs(*(None if values is None else _spread(values, at, len(forest)) for values in found))


class ScalarModel(nn.Module):
    """The scalar head of a sequence classifier at every position."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, forest: Forest) -> Tensor:
        """float32 [T]: the head's output at each token's own position, the state after reading that token."""
        scores = unwrapped(self.classifier).score(_filled_states(self.classifier, forest)).squeeze(-1).float()
        return scores[: len(forest)]


def at_predictor(values_T: Tensor, forest: Forest) -> Tensor:
    """[T]: the value of the state that predicts each token, 0 where nothing precedes."""
    predictor = forest.predictor_T
    return values_T.index_select(0, predictor.clamp(min=0)).masked_fill(predictor < 0, 0.0)


def at_last(values_T: Tensor, forest: Forest) -> Tensor:
    """[S]: the value at the last real token of each segment's path, 0 for an empty path."""
    last = forest.last_S
    return values_T.index_select(0, last.clamp(min=0)).masked_fill(last < 0, 0.0)


class ActorCritic(nn.Module):
    """Policy and value model in one container, so that one engine and one optimiser see both.

    Two trunks. Nothing inside is called from outside but through `forward`; generation uses `.policy.lm`.
    """

    def __init__(self, policy: PolicyModel, value: ScalarModel) -> None:
        super().__init__()
        self.policy = policy
        self.value = value

    def forward(
        self,
        forest: Forest,
        want: Sequence[str] = ("logprobs", "entropy", "values"),
        *,
        temperature: float = 1.0,
        select_T: Tensor | None = None,
    ) -> TokenOutputs:
        """`values_T` are gathered by predictor: the value of the state in which each token was chosen."""
        unknown = set(want) - {"logprobs", "entropy", "values"}
        if unknown:
            raise ValueError(f"want: {sorted(unknown)} are none of logprobs, entropy, values")
        out = TokenOutputs()
        if "logprobs" in want or "entropy" in want:
            out = self.policy(forest, temperature=temperature, entropy="entropy" in want, select_T=select_T)
        if "values" in want:
            out = out._replace(values_T=at_predictor(self.value(forest), forest))
        return out
