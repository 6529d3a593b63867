"""The peak sampler, the progress bar, and quiet imports."""

from __future__ import annotations

import io
import logging
import time
import warnings
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from lowbits.cli import memory
from lowbits.cli.bars import Bars
from lowbits.cli.loading import quiet

if TYPE_CHECKING:
    from pathlib import Path

MIB = 2**20


@pytest.mark.skipif(memory.resident_bytes() is None, reason="this system has no /proc")
def test_a_peak_that_is_over_is_seen() -> None:
    with memory.PeakSampler() as sampler:
        block = bytearray(b"x") * (64 * MIB)
        time.sleep(0.05)
        del block
    assert sampler.peak_bytes is not None
    assert 60 * MIB < sampler.peak_bytes < 100 * MIB


def test_a_system_without_proc_has_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    with memory.PeakSampler() as sampler:
        assert sampler.peak_bytes is None
    assert sampler.peak_bytes is None
    (tmp_path / "status").write_text("Name: x\n")
    assert memory.resident_bytes() is None


def test_one_phase_is_shown_at_a_time() -> None:
    stream = io.StringIO()
    with Bars(Console(file=stream, force_terminal=True, width=80)) as bars:
        bars.track("packing", 1, 2)
        bars.track("drawing", 1, 4)
    last = stream.getvalue().rsplit("drawing", maxsplit=1)[-1]
    assert "25%" in last
    assert "packing" not in last


def test_nothing_is_shown_where_no_terminal_is() -> None:
    stream = io.StringIO()
    with Bars(Console(file=stream)) as bars:
        bars.track("packing", 1, 2)
    assert not stream.getvalue().strip()


def test_quiet_ends(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("somebody")
    with quiet():
        log.warning("noise")
        warnings.warn("noise", FutureWarning, stacklevel=1)
    assert "noise" not in capsys.readouterr().err
    assert log.isEnabledFor(logging.WARNING)
    with pytest.raises(FutureWarning):
        warnings.warn("noise", FutureWarning, stacklevel=1)
