"""Time what numba could add on a CPU: nf4 decoded, and multiplied, by compiled loops.

    pip install numba && python benchmarks/bench_numba.py

A 3072 x 3072 layer, one thread, in turn, medians: lowbits' decoder against a loop that writes into
the same room; lowbits' layer against that loop and torch's product, and against one fused loop.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from paired import Pace, machine, machine_line, medians_s, number, parser, table
from torch import nn

import lowbits
from lowbits.backends.bnb import NF4

SIDE = 3072
BLOCK = 64
CODE = np.array(NF4, dtype=np.float32)
CPU = torch.device("cpu")


@numba.njit(fastmath=True)  # type: ignore[misc]
def decode(codes: Any, scale: Any, code: Any, out: Any) -> None:
    """Write ``(rows, row_length)`` float32."""
    for row in range(codes.shape[0]):
        for block in range(scale.shape[1]):
            factor, start = scale[row, block], block * BLOCK // 2
            for i in range(start, start + BLOCK // 2):
                byte = codes[row, i]
                out[row, 2 * i] = code[byte >> 4] * factor
                out[row, 2 * i + 1] = code[byte & 15] * factor


@numba.njit(fastmath=True)  # type: ignore[misc]
def fused(x: Any, codes: Any, scale: Any, code: Any, out: Any) -> None:
    """Write the product with one row of inputs, ``(rows,)``."""
    for row in range(codes.shape[0]):
        total = np.float32(0)
        for block in range(scale.shape[1]):
            part, start = np.float32(0), block * BLOCK // 2
            for i in range(start, start + BLOCK // 2):
                byte = codes[row, i]
                part += x[2 * i] * code[byte >> 4] + x[2 * i + 1] * code[byte & 15]
            total += part * scale[row, block]
        out[row] = total


def main() -> None:
    """Measure and print."""
    given = parser("bench_numba", __doc__).parse_args()
    torch.set_num_threads(given.threads)
    layer: Any = nn.Linear(SIDE, SIDE, bias=False)
    lowbits.quantize(layer, "bnb-nf4", rules={"*": "bnb-nf4"}, keep_source="none")
    codes = layer.weight_qdata.detach().numpy()
    scale = layer.weight_scale.detach().view(torch.float32).numpy()
    room, packed, backend = torch.empty(SIDE, SIDE), layer.weight._packed, lowbits.backend("bnb")
    result = np.empty(SIDE, dtype=np.float32)

    def looped(x: torch.Tensor) -> torch.Tensor:
        decode(codes, scale, CODE, room.numpy())
        return nn.functional.linear(x, room)

    few, many = torch.randn(1, SIDE), torch.randn(64, SIDE)
    row = few[0].numpy()
    work = {
        "decode, lowbits": lambda: backend.unpack(packed, torch.float32, out=room),
        "decode, numba": lambda: decode(codes, scale, CODE, room.numpy()),
        "1 token, lowbits": lambda: layer(few),
        "1 token, numba's decoder": lambda: looped(few),
        "1 token, numba fused": lambda: fused(row, codes, scale, CODE, result),
        "64 tokens, lowbits": lambda: layer(many),
        "64 tokens, numba's decoder": lambda: looped(many),
    }
    with torch.no_grad():
        medians = medians_s(work, CPU, Pace(given.rounds, given.rounds))
        fused(row, codes, scale, CODE, result)
        assert torch.allclose(torch.from_numpy(result), layer(few)[0], rtol=1e-3, atol=1e-3)
    print(table(("what", "ms"), [[name, number(s * 1000)] for name, s in medians.items()]))
    print(f"\n{machine_line(machine(CPU))} numba {numba.__version__}.")


if __name__ == "__main__":
    main()
