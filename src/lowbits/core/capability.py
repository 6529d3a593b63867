"""What a device multiplies fast: which dtypes, and which low-precision products it has.

[Note: compute dtypes]
| device                                | 16-bit layers in        | int8 product | float8 |
|---------------------------------------|-------------------------|--------------|--------|
| CUDA, SM 8.9 and newer                | their own dtype         | yes          | yes *  |
| CUDA, SM 8.0 to 8.8                   | their own dtype         | yes          | no     |
| CUDA, SM 7.5                          | float16                 | yes          | no     |
| CUDA, SM 7.0 to 7.4                   | float16                 | no           | no     |
| CUDA, older; GTX 16xx                 | float32                 | no           | no     |
| ROCm, XPU                             | their own dtype         | no           | no     |
| MPS                                   | float16                 | no           | no     |
| CPU with AMX or AVX512-bf16           | bfloat16; float16 in 32 | with VNNI    | no     |
| other CPUs                            | float32                 | with VNNI    | no     |

* Not on Windows. GTX 16xx claim SM 7.5, but have no tensor cores, and make NaN in float16.
Where float16 stands in for bfloat16, layers that their model keeps in float32 (transformers'
``_keep_in_fp32_modules``: activations beyond 65504) compute in float32. On a CPU without them,
16-bit products are 10 to 130 times slower than float32, int8 ones 30 times (docs/speed.md).
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Final, final

import torch

from lowbits.core.tracing import constant

#: Chips of SM 7.5 without tensor cores, which make NaN in float16.
_WITHOUT_TENSOR_CORES: Final = re.compile(
    r"\b(GTX 16\d\d|MX[45]50|T400|T500|T550|T600|T1000|T1200|T2000)\b"
)

_Version = tuple[int, int]
#: Lowest CUDA compute capabilities.
_SM_FLOAT8: Final = (8, 9)
_SM_BFLOAT16: Final = (8, 0)
_SM_INT8: Final = (7, 5)
_SM_FLOAT16: Final = (7, 0)

#: CUDA's limits: ``torch._int_mm`` wants so many rows, and sides that 8 divides;
#: ``torch._scaled_mm`` sides that 16 divides.
_INT8_ROWS: Final = 17
_INT8_MULTIPLE: Final = 8
_FLOAT8_MULTIPLE: Final = 16


@final
@dataclass(frozen=True)
class Capability:
    """What decides on compute dtypes and products; see [Note: compute dtypes].

    Attributes:
        device_type: of torch, e.g. ``"cuda"``.
        sm: CUDA compute capability; None on other devices, ROCm too.
        has_tensor_cores: False for GTX 16xx and its kin, whose compute capability promises them.
        has_row_scales: of ``torch._scaled_mm``; torch's builds for Windows lack those kernels.
        has_bfloat16: a CPU's AMX or AVX512-bf16.
        has_vnni: a CPU's int8 dot products.
    """

    device_type: str
    sm: _Version | None = None
    has_tensor_cores: bool = True
    has_row_scales: bool = True
    has_bfloat16: bool = False
    has_vnni: bool = False

    def compute_dtype(self, dtype: torch.dtype, *, keeps_fp32: bool = False) -> torch.dtype:
        """Return the dtype that a layer of ``dtype`` computes in.

        Args:
            dtype: of the layer.
            keeps_fp32: the model wants this layer in float32 where others are in float16.
        """
        if dtype in (torch.float32, torch.float64):
            return dtype
        fast = self._fast_16_bits(dtype)
        is_narrowed = fast == torch.float16 != dtype
        return torch.float32 if is_narrowed and keeps_fp32 else fast

    def _fast_16_bits(self, dtype: torch.dtype) -> torch.dtype:
        if self.device_type == "cpu":
            return dtype if dtype == torch.bfloat16 and self.has_bfloat16 else torch.float32
        if self.device_type == "mps":
            return torch.float16
        if self.sm is None or self.sm >= _SM_BFLOAT16:
            return dtype
        is_able = self.sm >= _SM_FLOAT16 and self.has_tensor_cores
        return torch.float16 if is_able else torch.float32

    def int8_rows(self, shape: tuple[int, int]) -> int | None:
        """Return the fewest rows that ``torch._int_mm`` takes; None where it is slow or refuses.

        Args:
            shape: of the weight.
        """
        if self.device_type == "cpu":
            return 1 if self.has_vnni else None
        if self.sm is None or self.sm < _SM_INT8 or not self.has_tensor_cores:
            return None
        return None if any(side % _INT8_MULTIPLE for side in shape) else _INT8_ROWS

    def has_float8_product(self, shape: tuple[int, int]) -> bool:
        """Say whether ``torch._scaled_mm`` by rows takes this weight."""
        if self.sm is None or self.sm < _SM_FLOAT8 or not self.has_row_scales:
            return False
        return not any(side % _FLOAT8_MULTIPLE for side in shape)


def capability(device: torch.device) -> Capability:
    """Return what a device can do."""
    if device.type == "cpu":
        cpu = torch.cpu
        has_bfloat16 = cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()
        return Capability("cpu", has_bfloat16=has_bfloat16, has_vnni=cpu._is_vnni_supported())
    if device.type == "cuda" and torch.version.hip is None:
        properties = torch.cuda.get_device_properties(device)
        return Capability(
            "cuda",
            (properties.major, properties.minor),
            has_tensor_cores=_WITHOUT_TENSOR_CORES.search(properties.name) is None,
            has_row_scales=sys.platform != "win32",
        )
    return Capability(device.type)


@constant
def compute_dtype(device: torch.device, dtype: torch.dtype, *, keeps_fp32: bool) -> torch.dtype:
    """As `Capability.compute_dtype`, of a device."""
    return capability(device).compute_dtype(dtype, keeps_fp32=keeps_fp32)


@constant
def int8_rows(device: torch.device, shape: tuple[int, int]) -> int | None:
    """As `Capability.int8_rows`, of a device."""
    return capability(device).int8_rows(shape)


@constant
def has_float8_product(device: torch.device, shape: tuple[int, int]) -> bool:
    """As `Capability.has_float8_product`, of a device."""
    return capability(device).has_float8_product(shape)
