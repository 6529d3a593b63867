"""What tests share: a LoRA of tiny FLUX, and mini-FLUX; made where a test asks for it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
from loras import save_lora
from torch import nn

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small LoRA of tiny FLUX."""
    folder = tmp_path_factory.mktemp("lora")
    save_lora(folder)
    return folder


@pytest.fixture(scope="module")
def original() -> Any:
    """Return mini-FLUX in float32, which each test leaves as it was."""
    import miniflux

    return miniflux.build()


@pytest.fixture(scope="module")
def plain(original: Any) -> Tensor:
    """Return its picture in full precision."""
    import miniflux

    return miniflux.picture(original)


@pytest.fixture
def pipe(original: Any) -> Any:
    """Return a pipeline of its own for each test, as some do not restore it."""
    parts = {
        name: copy.deepcopy(part)
        for name, part in original.components.items()
        if isinstance(part, nn.Module)
    }
    return type(original)(**{**original.components, **parts})


@pytest.fixture(scope="module")
def saved(original: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a packed pipeline; with its picture beside it."""
    import miniflux

    folder = tmp_path_factory.mktemp("saved")
    miniflux.save_drawn(original, folder, miniflux.SCHEME)
    return folder
