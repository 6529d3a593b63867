"""What tests of LoRAs share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from loras import save_lora

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small LoRA of tiny FLUX."""
    folder = tmp_path_factory.mktemp("lora")
    save_lora(folder)
    return folder
