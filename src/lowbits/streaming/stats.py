"""What streaming did, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, final

from lowbits.core.report import format_bytes

if TYPE_CHECKING:
    from lowbits.streaming.arbiter import Arbiter
    from lowbits.streaming.component import Component
    from lowbits.streaming.stage import Stage


@final
@dataclass(frozen=True)
class UnitStats:
    """What was done with one unit.

    Attributes:
        name: dotted name of its module, with the component in front; ``(base)`` is what no unit
            holds.
        nbytes: of its tensors, padding included.
        is_resident: whether it stays on the device, by the plan in force.
        copies: how often it was copied to the device.
        stall_s: seconds that compute has waited for it.
        misses: how often its bytes were not on their way when they were needed.
        compute_s: seconds of its forward, a running mean.
    """

    name: str
    nbytes: int
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
        device: that the model computes on.
        method: ``"queue"`` or ``"async"``.
        location: where masters are: ``"cpu"``, ``"shared"`` or ``"disk"``.
        depth: slots of the ring; 0 where everything is resident, or nothing ran yet.
        budget_bytes: cap on weights on the device.
        peak_device_bytes: the most weight bytes that were there at any time.
        host_bytes: of host memory that masters take, and staging buffers.
        pinned_bytes: of those, page-locked.
        disk_bytes: of the scratch file.
        copied_bytes: that were copied to the device.
        stall_s: that compute has waited for copies.
        misses: uses of units whose bytes were not on their way.
        recoveries: passes that ran out of memory, and were run again with fewer residents.
        passes: completed forwards.
        slow_passes: those that took more than three times the median: on Windows, probably the
            driver moving device memory to the host. Use a smaller budget.
        predicted_s: of a pass, by the plan.
        actual_s: of the last pass; 0 before the first.
        units: one by one.
        notes: why something is another way than it was asked for.
    """

    device: str
    method: str
    location: str
    depth: int
    budget_bytes: int
    peak_device_bytes: int
    host_bytes: int
    pinned_bytes: int
    disk_bytes: int
    copied_bytes: int
    stall_s: float
    misses: int
    recoveries: int
    passes: int
    slow_passes: int
    predicted_s: float
    actual_s: float
    units: tuple[UnitStats, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        # The last one is the base.
        resident = sum(unit.is_resident for unit in self.units[:-1])
        return (
            f"{format_bytes(self.peak_device_bytes)} of {format_bytes(self.budget_bytes)} on "
            f"{self.device} at most; {resident} of {len(self.units) - 1} units resident, "
            f"{self.location}, {self.method}, depth {self.depth}; "
            f"{format_bytes(self.copied_bytes)} copied in {self.passes} passes, "
            f"{self.stall_s:.3f} s waited, {self.misses} misses"
        )


def make_stats(
    component: Component, stage: Stage, arbiter: Arbiter, recoveries: int
) -> StreamStats:
    """Gather what is known of one streamed model."""
    plan, timing, tier = stage.plan, stage.timing, component.tier
    slot_of = stage.slots_of(component)
    units = tuple(
        UnitStats(
            name=".".join(part for part in (component.name, entry.unit.name) if part) or "(base)",
            nbytes=entry.unit.nbytes,
            is_resident=plan is not None and number not in slot_of,
            copies=entry.copies,
            stall_s=entry.stall_s,
            misses=entry.misses,
            compute_s=entry.compute_s,
        )
        for number, entry in enumerate(component.entries)
    )
    return StreamStats(
        device=str(arbiter.ops.device),
        method=stage.method,
        location=tier.name,
        depth=len(plan.slot_bytes) if plan else 0,
        budget_bytes=arbiter.budget_bytes,
        peak_device_bytes=stage.peak_device_bytes,
        host_bytes=tier.host_bytes + stage.staging_bytes,
        pinned_bytes=tier.pinned_bytes + (stage.staging_bytes if arbiter.ops.has_streams else 0),
        disk_bytes=tier.disk_bytes,
        copied_bytes=stage.copied_bytes,
        stall_s=sum(unit.stall_s for unit in units),
        misses=sum(unit.misses for unit in units),
        recoveries=recoveries,
        passes=timing.passes,
        slow_passes=timing.slow_passes,
        predicted_s=plan.predicted_s if plan else 0.0,
        actual_s=timing.walls[-1] if timing.walls else 0.0,
        units=units,
        notes=tuple(tier.notes),
    )
