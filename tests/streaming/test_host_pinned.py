"""Page-locked memory: what the CUDA runtime is asked for, and what happens where it refuses."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lowbits.errors import InsufficientMemoryError
from lowbits.streaming import host
from lowbits.streaming.host import ALIGNMENT

if TYPE_CHECKING:
    from torch import Tensor


class FakeCudart:
    """Records what is registered; refuses where told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.code = 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        self.calls.append(("register", address, nbytes, flags))
        return self.code

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802 - CUDA's name
        self.calls.append(("unregister", address))
        return self.code


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> FakeCudart:
    """Pretend that CUDA is there, with a stale error that fails the next kernel."""
    fake = FakeCudart()

    def kernel(*_: Any, **__: Any) -> Tensor:
        fake.calls.append(("kernel",))
        raise RuntimeError("the last error")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch, "zeros", kernel)
    return fake


def test_registered_memory_has_its_size_and_is_unregistered_once(cudart: FakeCudart) -> None:
    with torch.inference_mode():
        slab = host.pinned_empty(100_001)
    tensor, address = slab.tensor, slab.tensor.data_ptr()
    assert (tensor.shape, tensor.dtype, address % ALIGNMENT) == ((100_001,), torch.uint8, 0)
    assert not tensor.is_inference()
    tensor.fill_(3)
    slab.release()
    slab.release()
    assert cudart.calls == [("register", address, 100_001, 0), ("unregister", address)]
    assert (tensor == 3).all()


def test_registered_memory_is_unregistered_with_its_slab(cudart: FakeCudart) -> None:
    slab = host.pinned_empty(1)
    del slab
    gc.collect()
    assert [name for name, *_ in cudart.calls] == ["register", "unregister"]


@pytest.mark.parametrize("error", [None, RuntimeError("the device is gone")])
def test_copies_are_waited_for_before_memory_is_unregistered(
    cudart: FakeCudart, caplog: pytest.LogCaptureFixture, error: RuntimeError | None
) -> None:
    def settle() -> None:
        cudart.calls.append(("settle",))
        if error is not None:
            raise error

    host.pinned_empty(1, settle).release()
    assert [name for name, *_ in cudart.calls] == ["register", "settle", "unregister"]
    assert ("the device is gone" in caplog.text) is (error is not None)


def test_a_forked_child_does_not_unregister(
    cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    slab = host.pinned_empty(1, lambda: pytest.fail("it has no device to wait for"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    slab.release()
    assert [name for name, *_ in cudart.calls] == ["register"]


def test_a_failed_unregistration_is_logged(
    cudart: FakeCudart, caplog: pytest.LogCaptureFixture
) -> None:
    slab = host.pinned_empty(1)
    cudart.code = 713
    slab.release()
    assert "cudaHostUnregister failed with error 713" in caplog.text


def test_where_registering_fails_the_allocator_pins(
    cudart: FakeCudart, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cudart.code = 2
    asked: list[dict[str, Any]] = []

    def empty(nbytes: int, **options: Any) -> Tensor:
        asked.append(options)
        return torch.ones(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(torch, "empty", empty)
    slab = host.pinned_empty(10)
    assert slab.tensor.shape == (10,)
    slab.release()
    assert [name for name, *_ in cudart.calls] == ["register", "kernel"]
    assert asked == [{"dtype": torch.uint8, "device": "cpu", "pin_memory": True}]
    assert "cudaHostRegister failed with error 2" in caplog.text


def test_memory_that_cannot_be_locked_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no accelerator")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(InsufficientMemoryError, match="cannot lock 1.50 GiB .* no accelerator"):
        host.pinned_empty(3 << 29)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA or ROCm")
def test_registered_memory_on_a_device(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.zeros(100_001, dtype=torch.uint8, device="cuda")
    slab = host.pinned_empty(100_001)
    assert slab.tensor.is_pinned()
    slab.tensor.fill_(3)
    device.copy_(slab.tensor, non_blocking=True)
    assert (device == 3).all()
    address = slab.tensor.data_ptr()
    slab.release()
    # A second time fails, and must not fail the kernel that comes next.
    assert not host._succeeds("cudaHostUnregister", address)
    assert "cudaHostUnregister failed" in caplog.text
    assert (device + 1 == 4).all()
