"""Where the models of a process lie."""

from __future__ import annotations

import torch

from pipeline.flow.errors import UserError


def chosen_device(wanted: str = "auto") -> torch.device:
    """The device that `launch.device` (auto, cpu, cuda) says: auto is a GPU where PyTorch finds one.

    UserError where cuda is asked for and there is none.
    """
    found = torch.cuda.is_available()
    if wanted == "cuda" and not found:
        raise UserError("launch.device: cuda, but PyTorch finds no such device here; set launch.device to auto or cpu")
    return torch.device("cuda" if found and wanted != "cpu" else "cpu")
