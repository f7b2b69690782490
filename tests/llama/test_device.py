"""Where models lie."""

import pytest
import torch

from pipeline.flow.errors import UserError
from pipeline.llama.device import chosen_device, placed


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {chosen_device(wanted).type for wanted in ("auto", "cpu")} == {"cpu"}
    with pytest.raises(UserError, match="launch.device: cuda, but PyTorch finds no such device"):
        chosen_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [chosen_device(wanted).type for wanted in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]


def test_models_lie_on_the_device_for_a_phase_and_in_cpu_memory_after_it() -> None:
    class Moves(torch.nn.Module):
        def to(self, device: object) -> "Moves":  # type: ignore[override]
            where.append(str(device))
            return self

    where: list[str] = []
    with pytest.raises(ValueError), placed(torch.device("cuda"), Moves(), Moves()):
        assert where == ["cuda", "cuda"]
        raise ValueError
    assert where == ["cuda", "cuda", "cpu", "cpu"]
    with placed(torch.device("cpu"), Moves()):
        pass
    assert len(where) == 4  # nothing is touched where everything lies there already
