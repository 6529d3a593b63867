"""Devices, as callers name them: which of them torch can have tensors on here."""

from __future__ import annotations

from typing import Any

import torch

from lowbits.errors import ConfigError


def default_device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def named_device(value: Any) -> torch.device:
    """Return the device of a name; nothing is asked of it.

    Raises:
        ConfigError: torch knows no device of that name.
    """
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device: got {value!r}, expected one such as cpu or cuda:0") from error


def usable_device(value: Any) -> torch.device:
    """Return the device of a name, after a tensor without elements was made on it.

    Raises:
        ConfigError: there is no such device here, or not for this build of torch.
    """
    device = named_device(value)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # as each kind of device has it
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ConfigError(_refusal(device, reason)) from error
    if device.type == "meta":
        raise ConfigError(_refusal(device, "tensors there have no values"))
    return device


def numbered_device(device: torch.device) -> torch.device:
    """Return a device with its number, as tensors have it: ``cuda`` alone is what is current now.

    The CPU has none.
    """
    if device.type == "cpu":
        return torch.device("cpu")
    index: Any = device.index  # None where it has no number, whatever torch's stubs say
    current = torch.accelerator.current_accelerator(check_available=True)
    if index is None and current is not None and current.type == device.type:
        index = torch.accelerator.current_device_index()
    return torch.device(device.type, index or 0)


def _refusal(device: torch.device, why: str) -> str:
    here = ", ".join({"cpu": None, default_device().type: None})
    return (
        f"device: torch {torch.__version__} cannot compute on {str(device)!r} here ({why}); it can "
        f"on: {here}"
    )
