"""Shared by the tests of the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import STORES, Ended
from PIL import Image


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Calls ``dsm-tune`` in this process, in an empty folder."""
    from dsm_tune.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name in STORES:
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: str) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main(arguments)
        out, err = capfd.readouterr()
        assert isinstance(end.value.code, int)
        return Ended(end.value.code, out, err)

    return call


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder of six small images."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        noise = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{number}.jpg")
    return folder
