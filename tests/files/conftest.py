"""A pipeline's folder, made once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from pipelines import PIPELINES

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("flux")
    PIPELINES["flux"].build(dtype=torch.bfloat16).save_pretrained(folder)
    return folder
