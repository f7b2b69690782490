"""Devices by name, and ones that a user describes."""

from __future__ import annotations

import pytest

from pipeline.estimate.devices import device, machine_memory
from pipeline.flow.errors import UserError


def test_a_known_device_with_another_memory():
    assert device("h100").memory == 80e9
    assert device("h100", memory=4e10) == device("h100").__class__("h100", 989e12, 67e12, 4e10, 3.35e12)
    assert device(None).memory == machine_memory() > 1e8


def test_a_device_of_a_users_own():
    found = device(None, peak=1e14, memory=3.2e10)
    assert (found.name, found.peak("bf16"), found.peak("fp32"), found.memory) == ("custom", 1e14, 1e14, 3.2e10)


def test_an_unknown_name_is_told():
    with pytest.raises(UserError, match="--device: 'h1000' is not known; did you mean 'h100'"):
        device("h1000")
