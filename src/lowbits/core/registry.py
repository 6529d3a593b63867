"""Which backends exist, which of them work here, and which scheme belongs to whom."""

from __future__ import annotations

import difflib
import threading
import warnings
from importlib import metadata
from typing import TYPE_CHECKING, Final

from lowbits.core.scheme import NATIVE, REFERENCE_SHAPE, BackendInfo, Scheme, SchemeInfo
from lowbits.errors import (
    BackendUnavailableError,
    ConfigError,
    DuplicateBackendError,
    UnknownBackendError,
    UnknownSchemeError,
    suggestion,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lowbits.core.backend import QuantBackend

ENTRY_POINTS: Final = "lowbits.backends"

NATIVE_SCHEME: Final = Scheme(
    NATIVE, "the weights' own precision", code_bits=16, group_bits=0, forge_name="Automatic"
)


class BackendRegistry:
    """Backends by name.

    Backends announced by installed packages under the entry point group ``lowbits.backends`` are
    imported at the first look-up; importing one imports no quantization library, `probe` does.
    One lock guards everything: look-ups may come from several threads.
    """

    def __init__(self, *, discover: bool = True) -> None:
        self._backends: dict[str, QuantBackend] = {}
        self._broken: dict[str, str] = {}
        self._probes: dict[str, BackendInfo] = {}
        self._discover = discover
        self._lock = threading.RLock()

    def register(self, backend: QuantBackend) -> None:
        """Add a backend; its name and its schemes' names must be new.

        Raises:
            DuplicateBackendError: naming both sides.
        """
        with self._lock:
            self._load_entry_points()
            self._add(backend)

    def backend(self, name: str) -> QuantBackend:
        """Return the backend of this name, usable or not."""
        backends = self.all()
        if name in backends:
            return backends[name]
        if name in self._broken:
            raise BackendUnavailableError(f"backend {name!r} failed to load: {self._broken[name]}")
        known = ", ".join(sorted(backends))
        raise UnknownBackendError(
            f"unknown backend {name!r}{suggestion(name, backends)}; known: {known}"
        )

    def all(self) -> Mapping[str, QuantBackend]:
        """Return the registered backends by name; a copy."""
        with self._lock:
            self._load_entry_points()
            return dict(self._backends)

    def info(self, name: str) -> BackendInfo:
        """Say whether a backend works here; it is probed once."""
        backend = self.backend(name)
        with self._lock:
            if name not in self._probes:
                self._probes[name] = _probe(backend)
            return self._probes[name]

    def infos(self) -> tuple[BackendInfo, ...]:
        """Say of each backend whether it works here."""
        working = [self.info(name) for name in self.all()]
        broken = [
            BackendInfo(name, None, available=False, reason=reason, install=None)
            for name, reason in self._broken.items()
        ]
        return (*working, *broken)

    def find(self, scheme_name: str) -> tuple[QuantBackend | None, Scheme]:
        """Return a scheme and its backend; no backend for ``"native"``.

        Raises:
            UnknownSchemeError: with the closest name there is.
        """
        if scheme_name == NATIVE:
            return None, NATIVE_SCHEME
        names = [NATIVE]
        for backend in self.all().values():
            for scheme in backend.schemes():
                if scheme.name == scheme_name:
                    return backend, scheme
                names.append(scheme.name)
        raise UnknownSchemeError(_unknown_scheme(scheme_name, names))

    def require(self, scheme_name: str) -> tuple[QuantBackend | None, Scheme]:
        """Return a scheme that can be quantized to here, and its backend.

        Raises:
            UnknownSchemeError: no such scheme.
            ConfigError: it can be decoded only.
            BackendUnavailableError: its package is missing or broken: says which, and the command.
        """
        backend, scheme = self.find(scheme_name)
        if backend is None:
            return backend, scheme
        if not scheme.can_quantize:
            raise ConfigError(
                f"scheme {scheme_name!r} can only be decoded, not quantized to: lowbits.load reads "
                "files that hold it"
            )
        info = self.info(backend.name)
        if not info.available:
            step = f"; {info.install}" if info.install else ""
            raise BackendUnavailableError(
                f"scheme {scheme_name!r} needs backend {backend.name!r}: {info.reason}{step}"
            )
        return backend, scheme

    def schemes(self) -> tuple[SchemeInfo, ...]:
        """Return every scheme, in the order of the backends, ``native`` first."""
        rows = [_scheme_info(None, NATIVE_SCHEME, None)]
        for name, backend in self.all().items():
            rows += [_scheme_info(backend, scheme, self.info(name)) for scheme in backend.schemes()]
        return tuple(rows)

    def _load_entry_points(self) -> None:
        if not self._discover:
            return
        self._discover = False
        for entry in sorted(
            metadata.entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name
        ):
            try:
                self._add(entry.load()())
            except Exception as error:  # noqa: BLE001 - it becomes the reason that is reported
                self._broken[entry.name] = f"{type(error).__name__}: {error}"

    def _add(self, backend: QuantBackend) -> None:
        if backend.name in self._backends:
            raise DuplicateBackendError(
                f"backend name {backend.name!r} is taken by {self._backends[backend.name]!r}; "
                f"rename {backend!r}"
            )
        taken = {s.name: other for other in self._backends.values() for s in other.schemes()}
        for scheme in backend.schemes():
            if scheme.name in taken or scheme.name == NATIVE:
                owner = taken.get(scheme.name, "lowbits itself")
                raise DuplicateBackendError(
                    f"scheme name {scheme.name!r} of backend {backend.name!r} is taken by {owner!r}"
                )
        self._backends[backend.name] = backend


def _probe(backend: QuantBackend) -> BackendInfo:
    install = f"pip install {backend.requires!r}" if backend.requires else None
    try:
        with warnings.catch_warnings():
            # A deprecation is no breakage, also for a caller who turns warnings into errors.
            warnings.simplefilter("ignore")
            version = backend.probe()
    except Exception as error:  # noqa: BLE001 - it becomes the reason that is reported
        reason = f"{type(error).__name__}: {error}"
        return BackendInfo(backend.name, None, available=False, reason=reason, install=install)
    return BackendInfo(backend.name, version, available=True, reason=None, install=None)


def _scheme_info(
    backend: QuantBackend | None, scheme: Scheme, info: BackendInfo | None
) -> SchemeInfo:
    rows, row_length = REFERENCE_SHAPE
    bits = scheme.code_bits
    if backend:
        bits = backend.packed_bytes(scheme, rows, row_length) * 8 / (rows * row_length)
    reason = info.reason if info else None
    if backend and reason is None:
        reason = backend.unavailable(scheme)
    return SchemeInfo(
        name=scheme.name,
        backend=backend.name if backend else "-",
        summary=scheme.summary,
        bits_per_weight=bits,
        layer_kinds=scheme.kinds,
        devices=(backend.devices if backend else ()) or ("any",),
        row_multiple=scheme.row_multiple,
        can_quantize=scheme.can_quantize,
        available=reason is None,
        reason=reason,
        forge_name=scheme.forge_name,
    )


def _unknown_scheme(name: str, names: list[str]) -> str:
    # As others write them: Q4_K_M, NF4, fp8.
    short = name.lower().replace("fp8", "float8")
    close = [known for known in names if short in (known, *known.partition("-"))][:3]
    close = close or difflib.get_close_matches(short, names, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(names)}"
    )
    return f"unknown scheme {name!r}; {hint}"


#: The registry that `lowbits.apply` and friends use: the one piece of state of this library.
DEFAULT: Final = BackendRegistry()


def backend(name: str) -> QuantBackend:
    """Return a backend of the default registry; how a pickled layer finds its codec."""
    return DEFAULT.backend(name)
