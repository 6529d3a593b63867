"""What is read of the machine's memory, and of tensors'."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lowbits import errors
from lowbits.core import memory
from lowbits.core.memory import same_bits, storage_bytes

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that stands for the root of the file system."""
    monkeypatch.setattr(memory, "Path", lambda path: tmp_path / path.lstrip("/"))
    return tmp_path


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / {"meminfo": "proc/meminfo"}.get(name, f"sys/fs/cgroup/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_nothing_is_known_where_the_system_does_not_say(root: Path) -> None:
    assert memory.available_host_bytes() is None
    write(root, meminfo="MemTotal:  4096 kB\n")
    assert memory.available_host_bytes() is None


def test_other_systems_are_asked_by_psutil(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    psutil: Any = ModuleType("psutil")
    psutil.virtual_memory = lambda: SimpleNamespace(available=3 * MIB, total=9 * MIB)
    monkeypatch.setitem(sys.modules, "psutil", psutil)
    monkeypatch.setattr(sys, "platform", "win32")
    write(root, meminfo="MemAvailable:  4096 kB\n")
    assert memory.available_host_bytes() == 3 * MIB


@pytest.mark.parametrize(
    ("limit", "usage"),
    [
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ],
)
def test_the_smaller_of_machine_and_cgroup_counts(root: Path, limit: str, usage: str) -> None:
    write(root, meminfo="MemTotal:  9999 kB\nMemAvailable:  4096 kB\n")
    assert memory.available_host_bytes() == 4 * MIB
    write(root, **{limit: f"{3 * MIB}\n", usage: f"{2 * MIB}\n"})
    assert memory.available_host_bytes() == MIB
    write(root, **{limit: f"{30 * MIB}\n"})
    assert memory.available_host_bytes() == 4 * MIB


def test_a_cgroup_without_a_limit_does_not_count(root: Path) -> None:
    write(root, **{"memory.max": "max\n", "memory.current": f"{2 * MIB}\n"})
    assert memory.available_host_bytes() is None


def test_bytes_are_those_of_the_tensor() -> None:
    tensor = torch.tensor([1, 256], dtype=torch.int16)
    view = memory.bytes_of(tensor)
    assert bytes(view) == b"\x01\x00\x00\x01"
    tensor[0] = 3
    assert view[0] == 3
    assert not memory.bytes_of(torch.empty(0, 4))


@pytest.mark.parametrize("tensor", [torch.zeros(4, 4).T[:2], torch.zeros(2, device="meta")])
def test_bytes_that_do_not_lie_in_a_row_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(errors.ConfigError, match="expected a contiguous tensor on the CPU"):
        memory.bytes_of(tensor)


def test_writes_that_torch_does_not_count() -> None:
    counted = torch.zeros(2)
    counted.add_(1)
    assert memory.write_count(counted) == 1
    with torch.inference_mode():
        made, given = torch.zeros(2), torch.zeros(2)
        counted.data = torch.ones(2)
    given.data = torch.zeros(2)
    assert [memory.write_count(tensor) for tensor in (made, given, counted)] == [None, None, None]


def test_tensors_without_addresses_count_each() -> None:
    assert storage_bytes([torch.empty(n, device="meta") for n in (3, 5)]) == 32


def test_marks_on_views_are_no_bits() -> None:
    x = torch.randn(4, dtype=torch.complex64)
    assert same_bits(x.conj(), x.conj().resolve_conj())
    assert same_bits(x.conj().resolve_conj(), x.conj())
    assert same_bits(x.conj().imag, x.conj().imag.resolve_neg())
    assert not same_bits(x.conj(), x)
    assert not same_bits(x.conj().imag, x.imag)
