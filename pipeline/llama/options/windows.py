"""What a query sees of the keys of its own sequence, and how far away it takes them to be.

    Causal          all keys up to its own
    Window(w)       the last w of them                               Beltagy et al. 2020; Mistral's sliding window
    Lambda(w, f)    those and the first f of the sequence            Xiao et al. 2024 (StreamingLLM), section 3.2;
                                                                     Han et al. 2024 (LM-Infinite)
    Prefix          all keys up to its own, and the whole prompt     Raffel et al. 2020, section 3.2.1

Positions under Lambda are StreamingLLM's: those within the cache of f + w tokens, not those in the text. So a query at
position m >= f + w sees the first tokens as if it stood at f + w - 1, and no distance is ever longer than that; the
window's own distances are the true ones. (LM-Infinite, whose mask is the same, cuts distances at a ceiling instead.)

Positions, distances: whole numbers, queries [..., Q, 1] and keys [..., 1, N] of one sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.data.forest import Forest


class Causal:
    """`key` names what is visible, for what is worked out once a forest."""

    key: tuple[Any, ...] = ("causal",)
    by_prompt = False  # whether the prompt's length makes a difference

    def sees(self, queries: Tensor, keys: Tensor, prompt: Tensor) -> Tensor:
        """bool [..., Q, N]; `prompt` [..., 1, 1] tokens of the sequence are read as a whole, where that is done."""
        return keys <= queries

    def distance(self, queries: Tensor, keys: Tensor) -> Tensor:
        return queries - keys


class Window(Causal):
    def __init__(self, window: int) -> None:
        self.window = window
        self.key = ("window", window)

    def sees(self, queries: Tensor, keys: Tensor, prompt: Tensor) -> Tensor:
        return (keys <= queries) & (keys > queries - self.window)


class Lambda(Window):
    def __init__(self, window: int, first: int) -> None:
        super().__init__(window)
        self.first = first
        self.key = ("lambda", window, first)

    def sees(self, queries: Tensor, keys: Tensor, prompt: Tensor) -> Tensor:
        return (keys <= queries) & ((keys > queries - self.window) | (keys < self.first))

    def distance(self, queries: Tensor, keys: Tensor) -> Tensor:
        return torch.where(keys < self.first, self.capped(queries), queries) - keys

    def capped(self, queries: Tensor) -> Tensor:
        """Where the first tokens see a query."""
        return queries.clamp(max=self.first + self.window - 1)


class Prefix(Causal):
    key = ("prefix",)
    by_prompt = True

    def sees(self, queries: Tensor, keys: Tensor, prompt: Tensor) -> Tensor:
        return (keys <= queries) | (keys < prompt)


def new_sight(config: Any) -> Causal:
    if config.prefix_attention:
        return Prefix()
    if config.first_tokens:
        return Lambda(config.sliding_window, config.first_tokens)
    return Window(config.sliding_window) if config.sliding_window else Causal()


def prompt_lengths(forest: Forest) -> Tensor:
    """[S]: how many tokens of each segment's root are the prompt, which is read as a whole.

    A root's tokens before the first that is trained; of a root that others continue and of which nothing is trained,
    all. A root that stands alone and of which nothing is trained has no prompt: nobody says where it would end.
    """
    start, length, parent = (x.tolist() for x in (forest.start_S, forest.length_S, forest.parent_S))
    trained = (forest.weights_T != 0).tolist()
    continued = {up for up in parent if up >= 0}
    prompts: list[int] = []
    for s, up in enumerate(parent):
        if up >= 0:
            prompts.append(prompts[up])
            continue
        own = trained[start[s] : start[s] + length[s]]
        prompts.append(own.index(True) if True in own else length[s] if s in continued else 0)
    return torch.tensor(prompts, dtype=torch.int64, device=forest.ids_T.device)
