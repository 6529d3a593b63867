"""What streaming did, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, final

from lowbits.core.interception import is_streamed
from lowbits.core.memory import storage_bytes
from lowbits.core.packed import workspace_bytes
from lowbits.core.report import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor, nn

    from lowbits.streaming.arbiter import Arbiter
    from lowbits.streaming.engine import Engine


@final
@dataclass(frozen=True)
class UnitStats:
    """What was done with one unit.

    Attributes:
        name: dotted name of its module, with the component in front.
        nbytes: of its tensors, padding included.
        is_base: whether it is what no unit of its model holds.
        is_resident: whether it stays on the device, by the plan in force.
        copies: how often it was copied to the device.
        stall_s: seconds that compute has waited for it.
        misses: how often its bytes were not on their way when they were needed.
        compute_s: seconds of its forward, a running mean; on a device with streams of the passes
            that were measured: the first five, and every seventh, where the model itself is called
            and shares its ring with none.
    """

    name: str
    nbytes: int
    is_base: bool
    is_resident: bool
    copies: int
    stall_s: float
    misses: int
    compute_s: float


@final
@dataclass(frozen=True)
class StreamStats:
    """What streaming did since it was attached; memory in bytes, times in seconds.

    Attributes:
        device: that the models compute on.
        budget_bytes: cap on weights on the device.
        peak_device_bytes: the most weight bytes that were there at any time under this budget.
        method: ``"queue"`` or ``"async"``; empty where nothing is streamed.
        location: where masters are: ``"cpu"``, ``"shared"`` or ``"disk"``; empty as above.
        depth: slots of the ring; 0 where everything is resident, or nothing ran yet.
        host_bytes: of host memory that masters take, and staging buffers.
        pinned_bytes: of those, page-locked.
        disk_bytes: of the scratch file.
        workspace_bytes: of the largest packed weight while it is decoded: beside the budget.
        activation_bytes: that a call of a model took on the device beside weights: the most that is
            known; 0 where nothing is, as on a CPU.
        copied_bytes: that were copied to the device.
        stall_s: that compute has waited for copies.
        misses: uses of units whose bytes were not on their way.
        recoveries: passes that ran out of memory, and were run again with fewer residents; and
            calls of VAEs that were run again in tiles.
        passes: completed forwards of models.
        slow_passes: those that took more than three times the median: on Windows, probably the
            driver moving device memory to the host. Use a smaller budget.
        predicted_s: of a pass of each model, by its plan, and what was measured outside of units.
        actual_s: of their last passes; 0 before the first.
        units: one by one.
        notes: why something is another way than it was asked for.
    """

    device: str
    budget_bytes: int
    peak_device_bytes: int
    method: str = ""
    location: str = ""
    depth: int = 0
    host_bytes: int = 0
    pinned_bytes: int = 0
    disk_bytes: int = 0
    workspace_bytes: int = 0
    activation_bytes: int = 0
    copied_bytes: int = 0
    stall_s: float = 0.0
    misses: int = 0
    recoveries: int = 0
    passes: int = 0
    slow_passes: int = 0
    predicted_s: float = 0.0
    actual_s: float = 0.0
    units: tuple[UnitStats, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.method:
            return f"{format_bytes(self.peak_device_bytes)} on {self.device}, all of it to stay"
        units = [unit for unit in self.units if unit.nbytes and not unit.is_base]
        resident = sum(unit.is_resident for unit in units)
        return (
            f"{format_bytes(self.peak_device_bytes)} of {format_bytes(self.budget_bytes)} on "
            f"{self.device} at most; {resident} of {len(units)} units resident, "
            f"{self.location}, {self.method}, depth {self.depth}; "
            f"{format_bytes(self.copied_bytes)} copied in {self.passes} passes, "
            f"{self.stall_s:.3f} s waited, {self.misses} misses"
        )


def tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Return the Parameters and buffers of some models, but for what is streamed now."""
    tensors = (t for module in modules for t in (*module.parameters(), *module.buffers()))
    return [tensor for tensor in tensors if not is_streamed(tensor)]


def resident_stats(device: str, modules: Sequence[nn.Module]) -> StreamStats:
    """Return the figures of models that are on the device for good."""
    nbytes = storage_bytes(tensors_of(modules))
    return StreamStats(
        device=device,
        budget_bytes=nbytes,
        peak_device_bytes=nbytes,
        workspace_bytes=max((workspace_bytes(module) for module in modules), default=0),
    )


def make_stats(engines: Sequence[Engine], arbiter: Arbiter) -> StreamStats:
    """Gather what is known of some streamed models; the caller holds no lock."""
    with arbiter.lock:
        stages = list(dict.fromkeys(arbiter.stage_of(engine.component) for engine in engines))
        tiers = [engine.component.tier for engine in engines]
        for stage in stages:
            stage.timing.resolve()
        units = tuple(unit for engine in engines for unit in _units_of(engine, arbiter))
        staging = sum(stage.staging_bytes for stage in stages)
        plans = [stage.last_plan for stage in stages if stage.last_plan]
        return StreamStats(
            device=str(arbiter.ops.device),
            method=", ".join(dict.fromkeys(stage.method for stage in stages)),
            location=", ".join(dict.fromkeys(tier.name for tier in tiers)),
            depth=max((plan.depth for plan in plans), default=0),
            budget_bytes=arbiter.budget_bytes,
            peak_device_bytes=arbiter.peak_bytes,
            host_bytes=staging + sum(engine.component.host_bytes for engine in engines),
            pinned_bytes=sum(engine.component.pinned_bytes for engine in engines)
            + (staging if arbiter.ops.has_streams else 0),
            disk_bytes=sum(tier.disk_bytes for tier in tiers),
            workspace_bytes=max((workspace_bytes(engine.root) for engine in engines), default=0),
            activation_bytes=max((e.activations.nbytes or 0 for e in engines), default=0),
            copied_bytes=sum(stage.copied_bytes for stage in stages),
            stall_s=sum(unit.stall_s for unit in units),
            misses=sum(unit.misses for unit in units),
            recoveries=sum(engine.recoveries for engine in engines),
            passes=sum(stage.timing.passes for stage in stages),
            slow_passes=sum(stage.timing.slow_passes for stage in stages),
            predicted_s=sum(
                s.last_plan.predicted_s + s.timing.outside_s for s in stages if s.last_plan
            ),
            actual_s=sum(stage.timing.walls[-1] for stage in stages if stage.timing.walls),
            units=units,
            notes=tuple(dict.fromkeys(note for tier in tiers for note in tier.notes)),
        )


def _units_of(engine: Engine, arbiter: Arbiter) -> list[UnitStats]:
    component = engine.component
    stage = arbiter.stage_of(component)
    streamed = stage.streamed_of(component)
    return [
        UnitStats(
            name=".".join(part for part in (component.name, entry.unit.name) if part),
            nbytes=entry.unit.nbytes,
            is_base=entry is component.base,
            is_resident=stage.last_plan is not None and number not in streamed,
            copies=entry.copies,
            stall_s=entry.stall_s,
            misses=entry.misses,
            compute_s=entry.compute_s,
        )
        for number, entry in enumerate(component.entries)
    ]
