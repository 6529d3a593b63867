"""The built-in backends; each one is found through the entry points in pyproject.toml.

``lowbits.backends()`` lists every backend, whether it works here, and if not, why and what helps.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowbits.core.scheme import BackendInfo


class _CallablePackage(ModuleType):
    """Both meanings of ``lowbits.backends``: this package, and the public function.

    Importing any backend makes Python set the attribute ``lowbits.backends`` to the package: a
    function of that name would work until then, and no longer.
    """

    def __call__(self) -> tuple[BackendInfo, ...]:
        """Return every backend, whether it works here, and if not, why and what helps."""
        from lowbits.core.registry import DEFAULT

        return DEFAULT.infos()


sys.modules[__name__].__class__ = _CallablePackage
