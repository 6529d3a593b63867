"""Where modules lie, before they are moved to the device that computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbits.errors import ConfigError, PatchError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn


def homes_of(
    modules: Mapping[str, nn.Module], device: torch.device | None, *, is_ours: bool = False
) -> list[tuple[nn.Module, torch.device]]:
    """Return the modules that have to move, and where they are now.

    Args:
        modules: by name.
        device: that they are to be on; None: wherever they are.
        is_ours: they were streamed until now: what lies on several devices came from this one, and
            its packed weights have been on the host since.

    Raises:
        ConfigError: a module lies on several devices, so that it could not be put back.
        PatchError: it is on the meta device.
    """
    moves: dict[int, tuple[nn.Module, torch.device]] = {}
    if device is None:
        return []
    for name, module in modules.items():
        devices = {t.device for t in (*module.parameters(), *module.buffers())}
        if {found.type for found in devices} == {"meta"}:
            raise PatchError(
                f"{name or 'the target'} has weights without bytes (the meta device): load them, "
                "or remove its offload hooks (accelerate.hooks.remove_hook_from_module), first"
            )
        if not devices or all(same_device(d, device) for d in devices):
            continue
        if len(devices) > 1 and is_ours:
            devices = {device}
        if len(devices) > 1:
            places = ", ".join(sorted(map(str, devices)))
            raise ConfigError(
                f"{name or 'the target'} lies on several devices ({places}): remove its device map "
                "or offload hooks, or use lowbits.quantize, which moves nothing"
            )
        moves[id(module)] = (module, devices.pop())
    return list(moves.values())


def same_device(a: torch.device, b: torch.device) -> bool:
    """Say whether two names are of one device: ``cuda`` is any of its kind."""
    return a.type == b.type and (a.index == b.index or None in (a.index, b.index))
