"""Weights and their errors are those of the libraries that the schemes come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from lowbits.core.registry import DEFAULT

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def weight(rows: int = 96, row_length: int = 384) -> Tensor:
    """Gaussian weights with rows and columns of different size, as trained ones have."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, row_length, generator=generator) * 0.02
    values *= torch.exp(0.3 * torch.randn(rows, 1, generator=generator))
    return values * torch.exp(0.3 * torch.randn(1, row_length, generator=generator))


def ours(values: Tensor, scheme_name: str) -> Tensor:
    backend, scheme = DEFAULT.require(scheme_name)
    assert backend is not None
    return backend.unpack(backend.pack(values, scheme), torch.float32)


def error(values: Tensor, original: Tensor) -> float:
    return float((values - original).norm() / original.norm())


def bnb_4bit(kind: str, *, nested: bool = False) -> Callable[[Tensor], Tensor]:
    def upstream(values: Tensor) -> Tensor:
        from bitsandbytes import functional as bnb

        codes, state = bnb.quantize_4bit(
            values, blocksize=64, compress_statistics=nested, quant_type=kind
        )
        decoded: Tensor = bnb.dequantize_4bit(codes, state)
        return decoded

    return upstream


def bnb_int8(values: Tensor) -> Tensor:
    from bitsandbytes import functional as bnb

    codes, scale, _ = bnb.int8_vectorwise_quant(values)
    decoded: Tensor = bnb.int8_vectorwise_dequant(codes, scale)
    return decoded


def torchao(config_name: str) -> Callable[[Tensor], Tensor]:
    def upstream(values: Tensor) -> Tensor:
        from torchao import quantization

        layer = torch.nn.Linear(values.shape[1], values.shape[0], bias=False)
        layer.weight = torch.nn.Parameter(values)
        quantization.quantize_(layer, getattr(quantization, config_name)())
        decoded: Tensor = layer.weight.dequantize()
        return decoded

    return upstream


def torchao_tinygemm(values: Tensor) -> Tensor:
    """torchao's own int4 layout needs a GPU; its primitives are what it is made of."""
    from torchao.quantization import quant_primitives as primitives

    block = (1, 128)
    scale, zero = primitives._choose_qparams_affine_tinygemm(
        values, primitives.MappingType.ASYMMETRIC, block, torch.int32, 0, 15, 1e-6
    )
    codes = primitives._quantize_affine_tinygemm(values, block, scale, zero, torch.int32, 0, 15)
    decoded: Tensor = primitives._dequantize_affine_tinygemm(
        codes, block, scale, zero, torch.int32, 0, 15, output_dtype=torch.float32
    )
    return decoded


def quanto(qtype_name: str, group_size: int | None = None) -> Callable[[Tensor], Tensor]:
    def upstream(values: Tensor) -> Tensor:
        from optimum import quanto

        qtype = getattr(quanto, qtype_name)
        if group_size is None:
            scale = quanto.AbsmaxOptimizer()(values, qtype, 0)
            quantized = quanto.quantize_weight(values, qtype, 0, scale)
            decoded: Tensor = quantized.dequantize()
            return decoded
        # The packed tensor's own dequantize() compiles C++: the operators it is made of do not.
        scale, shift = quanto.MaxOptimizer()(values, qtype, 0, group_size)
        codes = torch.ops.quanto.quantize_affine(values, qtype.bits, 0, group_size, scale, shift)
        grouped: Tensor = codes * scale - shift
        return grouped.view(values.shape)

    return upstream


def plain_cast(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What diffusers' layerwise casting and Forge do."""
    return lambda values: values.to(dtype).float()


UPSTREAM: dict[str, Callable[[Tensor], Tensor]] = {
    "bnb-nf4": bnb_4bit("nf4"),
    "bnb-nf4-dq": bnb_4bit("nf4", nested=True),
    "bnb-fp4": bnb_4bit("fp4"),
    "bnb-int8": bnb_int8,
    "torchao-int8": torchao("Int8WeightOnlyConfig"),
    "torchao-int8-dynamic": torchao("Int8WeightOnlyConfig"),
    "torchao-float8": torchao("Float8WeightOnlyConfig"),
    "torchao-float8-dynamic": torchao("Float8WeightOnlyConfig"),
    "torchao-int4": torchao_tinygemm,
    "quanto-int8": quanto("qint8"),
    "quanto-float8": quanto("qfloat8"),
    "quanto-int4": quanto("qint4", 128),
    "quanto-int2": quanto("qint2", 128),
    "float8-e4m3fn-raw": plain_cast(torch.float8_e4m3fn),
    "float8-e5m2-raw": plain_cast(torch.float8_e5m2),
}


@pytest.mark.parametrize("scheme", UPSTREAM)
def test_error_equals_upstreams(scheme: str) -> None:
    values = weight()
    got, expected = error(ours(values, scheme), values), error(UPSTREAM[scheme](values), values)
    assert got == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "scheme", ["bnb-nf4", "bnb-nf4-dq", "bnb-fp4", "float8-e4m3fn-raw", "float8-e5m2-raw"]
)
def test_values_equal_upstreams_bit_for_bit(scheme: str) -> None:
    values = weight()
    assert torch.equal(ours(values, scheme), UPSTREAM[scheme](values))


@pytest.mark.parametrize("shape", [(5, 33), (3, 100), (300, 640)])
@pytest.mark.parametrize("scheme", ["bnb-nf4", "bnb-nf4-dq", "bnb-fp4"])
def test_blocks_that_run_across_rows_are_upstreams(scheme: str, shape: tuple[int, int]) -> None:
    values = weight(*shape)
    assert torch.equal(ours(values, scheme), UPSTREAM[scheme](values))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_gguf_bytes_and_values_equal_the_gguf_packages(kind: str) -> None:
    import gguf

    backend, scheme = DEFAULT.require(f"gguf-{kind.lower()}")
    assert backend is not None
    qtype = gguf.GGMLQuantizationType[kind]
    halves = torch.round(weight() * 400) / 800
    for values in (weight(), weight() * 1e-6, torch.zeros(4, 64), halves):
        packed = backend.pack(values.contiguous(), scheme)
        expected = gguf.quants.quantize(values.numpy(), qtype)
        assert (packed["qdata"].numpy() == expected).all()
        decoded = torch.from_numpy(gguf.quants.dequantize(expected, qtype))
        assert torch.equal(backend.unpack(packed, torch.float32), decoded)


@pytest.mark.parametrize("kind", ["e4m3fn", "e5m2"])
def test_a_scale_per_row_beats_the_plain_cast(kind: str) -> None:
    values = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    scaled = error(ours(values, f"float8-{kind}"), values)
    plain = error(ours(values, f"float8-{kind}-raw"), values)
    assert scaled < plain
    if kind == "e4m3fn":
        assert scaled == pytest.approx(0.0265, rel=0.02)
        assert plain == pytest.approx(0.0330, rel=0.02)


@pytest.mark.parametrize("scheme", ["float8-e4m3fn", "float8-e4m3fn-raw"])
def test_a_parameter_can_be_cast(scheme: str) -> None:
    values = weight()
    assert torch.equal(ours(torch.nn.Parameter(values), scheme), ours(values, scheme))


def test_nf4_and_its_nested_scales_match_the_librarys_tables() -> None:
    from bitsandbytes import functional as bnb

    from lowbits.backends import bnb as module

    _, state = bnb.quantize_4bit(torch.ones(1, 64), blocksize=64, quant_type="nf4")
    assert state.code.tolist() == list(module.NF4)
    assert bnb.create_dynamic_map().tolist() == pytest.approx(module._dynamic_values(), abs=1e-8)


def test_rows_of_one_weight() -> None:
    values = torch.linspace(-1, 1, 7).view(7, 1)
    for info in filter(lambda info: info.can_quantize, DEFAULT.schemes()):
        backend, scheme = DEFAULT.require(info.name)
        if backend is not None and scheme.refusal("Linear", 1) is None:
            assert error(ours(values, info.name), values) < 0.2, info.name


def test_a_single_row_of_odd_length() -> None:
    values = torch.linspace(-1, 1, 7).view(1, 7)
    for info in filter(lambda info: info.can_quantize, DEFAULT.schemes()):
        backend, scheme = DEFAULT.require(info.name)
        if backend is not None and scheme.refusal("Linear", 7) is None:
            decoded = ours(values, info.name)
            assert decoded.shape == (1, 7)
            assert error(decoded, values) < 0.2, info.name
