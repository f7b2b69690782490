"""Where the models of a process lie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pipeline.flow.errors import UserError


def chosen_device(wanted: str = "auto") -> torch.device:
    """The device that `launch.device` (auto, cpu, cuda) says: auto is a GPU where PyTorch finds one.

    UserError where cuda is asked for and there is none.
    """
    found = torch.cuda.is_available()
    if wanted == "cuda" and not found:
        raise UserError("launch.device: cuda, but PyTorch finds no such device here; set launch.device to auto or cpu")
    return torch.device("cuda" if found and wanted != "cpu" else "cpu")


@contextmanager
def placed(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """Inside, frozen modules lie on `device`; before and afterwards in CPU memory, so that what takes turns fits."""
    moved = modules if device.type != "cpu" else ()
    try:
        for module in moved:
            module.to(device)
        yield
    finally:
        for module in moved:
            module.to("cpu")
