"""lowbits: run any torch module or diffusers pipeline in the memory you have.

handle = lowbits.apply(pipe, "bnb-nf4")     # in place; every byte accounted for
print(handle.report())
handle.restore()                            # bit-exactly
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lowbits import errors as errors

if TYPE_CHECKING:
    from lowbits import files as files
    from lowbits import forge as forge
    from lowbits import testing as testing
    from lowbits._api import apply as apply
    from lowbits._api import backend as backend
    from lowbits._api import quantize as quantize
    from lowbits._api import register_backend as register_backend
    from lowbits._api import schemes as schemes
    from lowbits._applied import dequantize as dequantize
    from lowbits._applied import handle as handle
    from lowbits._applied import merge_lora as merge_lora
    from lowbits._applied import restore as restore
    from lowbits._applied import unmerge_lora as unmerge_lora
    from lowbits._convert import convert as convert
    from lowbits._convert import inspect as inspect
    from lowbits._convert import save_gguf as save_gguf
    from lowbits._files import adopt as adopt
    from lowbits._files import load as load
    from lowbits._files import load_pipeline as load_pipeline
    from lowbits._files import save as save
    from lowbits.config import LowbitsConfig as LowbitsConfig
    from lowbits.core.backend import Packed as Packed
    from lowbits.core.backend import QuantBackend as QuantBackend
    from lowbits.core.handle import Handle as Handle
    from lowbits.core.report import LayerReport as LayerReport
    from lowbits.core.report import Report as Report
    from lowbits.core.scheme import BackendInfo as BackendInfo
    from lowbits.core.scheme import Scheme as Scheme
    from lowbits.core.scheme import SchemeInfo as SchemeInfo
    from lowbits.progress import CancelToken as CancelToken
    from lowbits.progress import ProgressEvent as ProgressEvent
    from lowbits.streaming.budget import device_budget as device_budget
    from lowbits.streaming.stats import StreamStats as StreamStats
    from lowbits.streaming.stats import UnitStats as UnitStats
    from lowbits.streaming.streamer import LayerStreamer as LayerStreamer

    def backends() -> tuple[BackendInfo, ...]:
        """Return every backend, and whether it works here; see `lowbits.backends`."""


#: Where each public name lives; it is imported at its first use.
_HOMES = {
    "lowbits._api": "apply backend quantize register_backend schemes",
    "lowbits._applied": "dequantize handle merge_lora restore unmerge_lora",
    "lowbits._convert": "convert inspect save_gguf",
    "lowbits._files": "adopt load load_pipeline save",
    "lowbits.config": "LowbitsConfig",
    "lowbits.core.backend": "Packed QuantBackend",
    "lowbits.core.handle": "Handle",
    "lowbits.core.report": "LayerReport Report",
    "lowbits.core.scheme": "BackendInfo Scheme SchemeInfo",
    "lowbits.progress": "CancelToken ProgressEvent",
    "lowbits.streaming.budget": "device_budget",
    "lowbits.streaming.stats": "StreamStats UnitStats",
    "lowbits.streaming.streamer": "LayerStreamer",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = ["__version__", "backends", "errors", "files", "forge", "testing", *_HOME_OF]  # noqa: PLE0604 - all strings


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("lowbits")
    if name in ("backends", "files", "forge", "testing"):  # modules; the first one is callable
        return importlib.import_module(f"lowbits.{name}")
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'lowbits' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
