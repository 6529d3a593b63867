"""Which dtype and which product a device is given; the table is faked, the products are real."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import bitsandbytes_takes_blocks_across_rows
from torch import nn

import lowbits
from lowbits.backends.bnb import BitsAndBytesBackend, has_kernels
from lowbits.core import capability as module
from lowbits.core import products
from lowbits.core.backend import Packed
from lowbits.core.capability import Capability
from lowbits.core.registry import DEFAULT

CPU = Capability("cpu")
AMX = Capability("cpu", has_bfloat16=True, has_vnni=True)
PASCAL = Capability("cuda", (6, 1))
VOLTA = Capability("cuda", (7, 0))
TURING = Capability("cuda", (7, 5))
GTX_16 = Capability("cuda", (7, 5), has_tensor_cores=False)
AMPERE = Capability("cuda", (8, 6))
ADA = Capability("cuda", (8, 9))
HOPPER = Capability("cuda", (9, 0))
ROCM, XPU, MPS = Capability("cuda"), Capability("xpu"), Capability("mps")

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("device", "for_f16", "for_bf16"),
    [
        (CPU, F32, F32),
        (AMX, F32, BF16),
        (PASCAL, F32, F32),
        (GTX_16, F32, F32),
        (VOLTA, F16, F16),
        (TURING, F16, F16),
        (AMPERE, F16, BF16),
        (HOPPER, F16, BF16),
        (ROCM, F16, BF16),
        (XPU, F16, BF16),
        (MPS, F16, F16),
    ],
    ids=str,
)
def test_each_device_computes_in_what_it_is_fast_in(
    device: Capability, for_f16: torch.dtype, for_bf16: torch.dtype
) -> None:
    assert device.compute_dtype(F16) == for_f16
    assert device.compute_dtype(BF16) == for_bf16
    assert device.compute_dtype(F32) == F32
    assert device.compute_dtype(torch.float64) == torch.float64


def test_float16_does_not_stand_in_where_it_is_too_narrow() -> None:
    assert TURING.compute_dtype(BF16, keeps_fp32=True) == F32
    assert MPS.compute_dtype(BF16, keeps_fp32=True) == F32
    assert TURING.compute_dtype(F16, keeps_fp32=True) == F16, (
        "the model's own float16 is its choice"
    )
    assert AMPERE.compute_dtype(BF16, keeps_fp32=True) == BF16


@pytest.mark.parametrize(
    ("device", "fewest"),
    [(CPU, None), (AMX, 1), (VOLTA, None), (GTX_16, None), (TURING, 17), (AMPERE, 17),
     (HOPPER, 17), (ROCM, None), (XPU, None), (MPS, None)],
    ids=str,
)  # fmt: skip
def test_int8_products(device: Capability, fewest: int | None) -> None:
    assert device.int8_rows((96, 64)) == fewest
    if device.sm:
        assert device.int8_rows((97, 64)) is None
        assert device.int8_rows((96, 63)) is None


@pytest.mark.parametrize(
    ("device", "expected"),
    [(CPU, False), (AMX, False), (TURING, False), (AMPERE, False), (ADA, True), (HOPPER, True),
     (ROCM, False), (XPU, False), (MPS, False)],
    ids=str,
)  # fmt: skip
def test_float8_products(device: Capability, expected: bool) -> None:  # noqa: FBT001
    assert device.has_float8_product((96, 64)) is expected
    assert device.has_float8_product((96, 72)) is False
    assert replace(device, has_row_scales=False).has_float8_product((96, 64)) is False


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("NVIDIA GeForce GTX 1660 Ti", (7, 5), GTX_16),
        ("NVIDIA T1000 8GB", (7, 5), GTX_16),
        ("NVIDIA GeForce MX450", (7, 5), GTX_16),
        ("NVIDIA GeForce RTX 2060", (7, 5), TURING),
        ("Tesla T4", (7, 5), TURING),
        ("NVIDIA H100 80GB HBM3", (9, 0), HOPPER),
    ],
)
def test_a_cuda_device_is_asked_what_it_is(
    name: str, version: tuple[int, int], expected: Capability, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Properties:
        major, minor = version

    properties: Any = Properties()
    properties.name = name
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert module.capability(torch.device("cuda", 0)) == expected


def test_a_cpu_is_asked_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert module.capability(torch.device("cpu")) == AMX


@pytest.mark.parametrize(
    ("scheme", "device", "is_used"),
    [
        ("torchao-int8-dynamic", AMX, True),
        ("torchao-int8-dynamic", CPU, False),
        ("torchao-float8-dynamic", ADA, True),
        ("torchao-float8-dynamic", AMPERE, False),
        ("float8-e4m3fn-dynamic", HOPPER, True),
        ("float8-e4m3fn-dynamic", CPU, False),
        ("float8-e4m3fn", HOPPER, False),
        ("torchao-int8", AMX, False),
    ],
    ids=str,
)
def test_a_dynamic_scheme_multiplies_in_low_precision_where_the_device_can(
    scheme: str,
    device: Capability,
    is_used: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend, found = DEFAULT.require(scheme)
    assert backend is not None
    library = f"lowbits.backends.{backend.name}"
    if backend.name == "torchao":
        monkeypatch.setattr(f"{library}.int8_rows", lambda _, shape: device.int8_rows(shape))
    monkeypatch.setattr(
        f"{library}.has_float8_product", lambda _, shape: device.has_float8_product(shape)
    )
    weight = torch.randn(96, 64)
    packed = backend.pack(weight, found)
    x, bias = torch.randn(2, 20, 64), torch.randn(96)
    y = backend.linear(x, packed, bias)
    assert (y is not None) is is_used
    if y is not None:
        expected = nn.functional.linear(x, backend.unpack(packed, F32), bias)
        assert y.shape == expected.shape
        error = float((y - expected).norm() / expected.norm())
        assert 1e-4 < error < 0.05, "activations are quantized too"


def test_products_of_rows_of_zeros_are_zero() -> None:
    qdata, scale = torch.ones(16, 32, dtype=torch.int8), torch.ones(16, 1)
    assert torch.equal(
        products.int8_product(torch.zeros(17, 32), qdata, scale), torch.zeros(17, 16)
    )
    float8 = torch.ones(16, 32).to(torch.float8_e4m3fn).view(torch.uint8)
    assert products.float8_product(torch.zeros(17, 32), float8, scale).abs().max() == 0


def test_a_model_says_which_layers_stay_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(nn.Module):
        _keep_in_fp32_modules = ("wo",)

        def __init__(self) -> None:
            super().__init__()
            self.wi, self.wo = nn.Linear(64, 96), nn.Linear(96, 64)

    model = Model().bfloat16()
    lowbits.quantize(model, "torchao-int8", rules={"*": "torchao-int8"})
    monkeypatch.setattr(
        "lowbits.core.packed.compute_dtype",
        lambda _, dtype, **options: TURING.compute_dtype(dtype, **options),
    )
    seen = []

    def record(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(rest[-1])
        return x

    monkeypatch.setattr("lowbits.core.functional.linear", record)
    model.wi(torch.zeros(1, 64))
    model.wo(torch.zeros(1, 96))
    assert seen == [F16, F32]


def test_a_float16_asked_for_is_not_forced_on_layers_that_it_is_too_narrow_for() -> None:
    class Model(nn.Module):
        _keep_in_fp32_modules_strict = ("wo",)

        def __init__(self) -> None:
            super().__init__()
            self.wo = nn.Linear(96, 64)

    model = Model().bfloat16()
    lowbits.quantize(model, "torchao-int8", rules={"*": "torchao-int8"}, compute_dtype=F16)
    x = torch.full((1, 96), 3e5, dtype=BF16)
    assert model.wo(x).isfinite().all()


@pytest.mark.parametrize("name", ["bnb-int8", "quanto-float8", "float8-e5m2", "float8-e5m2-raw"])
@pytest.mark.parametrize("n_tokens", [5, 50])
def test_accelerators_multiply_by_8_bit_codes_and_scale_what_is_less(
    name: str, n_tokens: int
) -> None:
    backend, scheme = DEFAULT.require(name)
    assert backend is not None
    packed = backend.pack(torch.randn(96, 64), scheme)
    x, bias = torch.randn(2, n_tokens, 64), torch.randn(96)
    kinds = {"quanto-float8": torch.float8_e4m3fn, "bnb-int8": torch.int8}
    codes = packed["qdata"].view(kinds.get(name, torch.float8_e5m2))
    expected = nn.functional.linear(x, backend.unpack(packed, F32), bias)
    got = products._scaled_linear(x, codes, packed.tensors.get("scale"), bias)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert backend.linear(x.bfloat16(), packed, bias.bfloat16()) is None, "a CPU dequantizes"
    y = backend.linear(
        torch.empty(2, n_tokens, 64, dtype=BF16, device="meta"),
        Packed(name, packed.shape, {k: t.to("meta") for k, t in packed.tensors.items()}),
        torch.empty(96, dtype=BF16, device="meta"),
    )
    assert y is not None
    assert (y.shape, y.dtype) == ((2, n_tokens, 96), BF16)


@pytest.mark.parametrize("name", ["bnb-nf4", "bnb-nf4-dq", "bnb-fp4"])
@pytest.mark.parametrize("row_length", [128, 96])
def test_fused_4_bit_kernels_get_what_they_expect(name: str, row_length: int) -> None:
    """The operator that CUDA has kernels for, here in bitsandbytes' own reference form."""
    backend, scheme = DEFAULT.require(name)
    assert isinstance(backend, BitsAndBytesBackend)
    if row_length % 64 and not bitsandbytes_takes_blocks_across_rows():
        pytest.skip("needs a bitsandbytes whose kernel for this CPU takes blocks across rows")
    packed = backend.pack(torch.randn(32, row_length), scheme)
    x, bias = torch.randn(2, 5, row_length), torch.randn(32)
    expected = nn.functional.linear(x, backend.unpack(packed, F32), bias)
    assert has_kernels()
    assert torch.allclose(backend._fused(x, packed, bias), expected, rtol=1e-5, atol=1e-5)
