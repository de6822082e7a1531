"""The wheel holds what an installed dsm-tune needs, found from anywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SPACES = {"default", "paper", "wide"}


def run(*command: str | Path, cwd: Path) -> str:
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = list(map(str, command))
    done = subprocess.run(words, cwd=cwd, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, without network."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for name in ("dsm_tune", "search_spaces"):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, sources / name, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder)
    run(*build, sources, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with the wheel; the libraries are those of this one."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    here = sysconfig.get_path("purelib")
    (site / "libraries.pth").write_text(f"{here}\n")
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install")
    run(*pip, "--no-deps", "--no-index", "--ignore-installed", "--quiet", wheel, cwd=folder)
    return folder / "bin" / "python"


def test_the_wheel_holds_spaces_and_demo_weights_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"dsm_tune/search_spaces/{name}.toml" for name in SPACES} <= names
    assert "dsm_tune/demo/digits_vit.safetensors" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names}
    assert len(tops) == 2, tops  # the package and its metadata


def test_an_installed_dsm_tune_finds_its_spaces_from_outside_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    code = (
        "import dsm_tune\n"
        "from dsm_tune.searching.space import load_space, space_names\n"
        "print(dsm_tune.__file__, *space_names(), load_space('default').name)"
    )
    where, *names = run(installed, "-c", code, cwd=tmp_path).split()
    assert Path(where).is_relative_to(installed.parents[1])
    assert set(names) >= SPACES
    assert names[-1] == "default"


def test_an_installed_dsm_tune_finds_its_demo_weights(installed: Path, tmp_path: Path) -> None:
    code = (
        "from dsm_tune import demo\n"
        "model, (pixels, labels) = demo.create_model(), demo.load_split('holdout')\n"
        "print(f'{float((model(pixels[:64]).argmax(1) == labels[:64]).float().mean()):.3f}')"
    )
    assert float(run(installed, "-c", code, cwd=tmp_path)) > 0.9


def test_an_installed_dsm_tune_has_its_command(installed: Path, tmp_path: Path) -> None:
    said = run(installed.with_name("dsm-tune"), "--version", cwd=tmp_path)
    assert "0.1.0" in said
    assert list(tmp_path.iterdir()) == []
