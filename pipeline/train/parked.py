"""Frozen models that take less room between the phases that read them: cut over the ranks, or in CPU memory.

    parked = Parked(ranks, "sharded", [reference, *rewards], staying=[actor])
    with parked.whole(reference):       put together once for the phase, not for every layer of every pass
        targets = learner.targets(...)

An update of PPO, where memory is highest, reads neither reference nor reward models. Every rank holds 1 / world of them
then (as ZeRO-3's shards, Rajbhandari et al. 2020, section 5.3), or none on its device. Bits do not change. Models are
parked from CPU memory, where they are opened, so that a device never holds all of them whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.llama.adapters import share_frozen
from pipeline.train.strategy import Strategy

Kind = Literal["whole", "sharded", "offloaded"]


class Parked:
    """`models` may hold weights in common; what they hold in common with modules that are `staying` stays too."""

    def __init__(
        self, ranks: Strategy, kind: Kind, models: Sequence[nn.Module], staying: Sequence[nn.Module] = ()
    ) -> None:
        stays = {p.data_ptr() for module in staying for p in module.parameters() if p.numel()}
        self._spaces: dict[int, _Space] = {}  # by address, so that weights in common are cut once
        self._of: dict[nn.Module, list[_Space]] = {model: [] for model in models}
        if kind == "whole" or (kind == "sharded" and ranks.world == 1):
            return
        for model in self._of:
            for parameter in model.parameters():
                address = parameter.data_ptr()
                if parameter.requires_grad or not parameter.numel() or address in stays:
                    continue
                space = self._spaces.setdefault(address, _Space(ranks, kind, parameter))
                space.parameters.append(parameter)
                if space not in self._of[model]:
                    self._of[model].append(space)
        for space in self._spaces.values():
            space.leave()

    @property
    def bytes(self) -> int:
        """What this rank does not hold between phases."""
        return sum(space.saved for space in self._spaces.values())

    @contextmanager
    def whole(self, *models: nn.Module) -> Iterator[None]:
        """Inside, these models can be called. Every rank must enter it; the models' order is the same on all."""
        with ExitStack() as stack:
            for space in _once(space for model in models for space in self._of.get(model, [])):
                space.fetch()
                stack.callback(space.leave)
            yield


def bring(
    ranks: Strategy,
    kind: Kind,
    actor: nn.Module,
    still: Sequence[nn.Module],
    moving: Sequence[nn.Module] = (),
    staying: Sequence[nn.Module] = (),
) -> Parked:
    """A row's models, opened in CPU memory, on this rank's device; those that are `still` parked.

    actor    trained; ZeRO-3 brings it to the device itself. Where an engine cuts it up it shares nothing with others.
    moving   frozen, but with weights that follow others: whole
    staying  parts of models that are still, which updates read as well
    """
    own = list(actor.children())
    parked = Parked(ranks, kind, still, staying=staying if ranks.sharded else [*own, *staying])
    there: list[nn.Module] = []
    for model in (*([] if ranks.places else own), *moving, *still):
        model.to(ranks.device)
        if model in still or (model in own and not ranks.sharded):
            there.append(model)  # one by one, so that a device holds a shared base once, and once more for a moment
            share_frozen(*there)
    return parked


class _Space:
    """One tensor of weights, and all parameters that are it."""

    def __init__(self, ranks: Strategy, kind: Kind, parameter: nn.Parameter) -> None:
        self.ranks, self.kind, self.parameters = ranks, kind, []  # type: Strategy, Kind, list[nn.Parameter]
        self.shape, self.device, self.size = parameter.shape, ranks.device, parameter.numel()
        self.inside = 0  # phases that read it now
        self.part: Tensor | None = None
        self.saved = 0

    def leave(self) -> None:
        self.inside = max(0, self.inside - 1)
        if self.inside:
            return
        whole = self.parameters[0].data
        if self.part is None:  # its bits never change, so that they are taken once
            self.part = self._part_of(whole)
            kept = 0 if self.kind == "offloaded" and self.device.type != "cpu" else self.part.numel()
            self.saved = (self.size - kept) * whole.element_size()
        for parameter in self.parameters:
            parameter.data = whole.new_empty(0)

    def fetch(self) -> None:
        self.inside += 1
        if self.inside > 1:
            return
        assert self.part is not None
        if self.kind == "offloaded":
            whole = self.part.to(self.device)
        else:
            flat = self.part.new_empty(self.part.numel() * self.ranks.world)
            # As bytes: not every backend of torch.distributed gathers every type.
            torch.distributed.all_gather_into_tensor(flat.view(torch.uint8), self.part.view(torch.uint8))
            whole = flat[: self.size].view(self.shape)
        for parameter in self.parameters:
            parameter.data = whole

    def _part_of(self, whole: Tensor) -> Tensor:
        if self.kind == "offloaded":
            return whole.detach().cpu()
        each = -(-self.size // self.ranks.world)
        flat = torch.nn.functional.pad(whole.detach().reshape(-1), (0, each * self.ranks.world - self.size))
        return flat[self.ranks.rank * each : (self.ranks.rank + 1) * each].clone().to(self.device)


def _once(spaces: Iterable[_Space]) -> list[_Space]:
    return list({id(space): space for space in spaces}.values())
