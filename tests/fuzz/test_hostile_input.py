"""Whatever a file holds, it is read or refused in one line; nothing else ever comes of it.

Each subject is a file that a user may have got from somebody else. The plain run tries some
thousands, ``pytest -m slow tests/fuzz`` more than a hundred thousand, other ones each time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pickle
import shutil
import socket
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from damage import damaged, json_text, mutated, toml_text, with_bytes
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from watch import watched

from dsm_tune import demo, production
from dsm_tune.cli.options import gather
from dsm_tune.cli.studies import tune
from dsm_tune.config import TuneConfig
from dsm_tune.errors import DsmTuneError, ImagesError, ModelError
from dsm_tune.exporting.bundle import open_bundle
from dsm_tune.exporting.manifest import FORMAT, Manifest, digest_of
from dsm_tune.measuring.images import input_size, load_image
from dsm_tune.measuring.labels import read_labels
from dsm_tune.merging.backbone import read_geometry
from dsm_tune.merging.loading import load_weights
from dsm_tune.merging.published import dsm_plan, tome_plan
from dsm_tune.methods import read_plan as read_plan_file
from dsm_tune.plan import MergePlan
from dsm_tune.production import Source
from dsm_tune.searching.space import build, load_space, space_names

SPACES = Path(__file__).resolve().parents[2] / "search_spaces"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A kind of input.

    Attributes:
        cases: what it may be.
        write: puts a case into an empty folder; returns the file, or the folder, to be read.
        read: uses that as dsm-tune does; raises DsmTuneError or not.
        few, many: cases of the plain and of the long run.
    """

    cases: st.SearchStrategy[Any]
    write: Callable[[Any, Path], Path]
    read: Callable[[Path], None]
    few: int
    many: int


# -- search spaces, configurations, plans ---------------------------------------------------------

MODEL = demo.create_model()
GEOMETRY = read_geometry(MODEL)
PLANS = [
    json.loads(plan.to_json())
    for plan in (tome_plan(MODEL, r=9), dsm_plan(MODEL, r=9, delay=1, window=4, local_blocks=2))
]


def written(name: str) -> Callable[[bytes, Path], Path]:
    """Writes the bytes of a case to a file of this name."""

    def write(content: bytes, folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def write_with_suffix(case: tuple[str, bytes], folder: Path) -> Path:
    suffix, content = case
    return written(f"file.{suffix}")(content, folder)


def read_space(file: Path) -> None:
    space = load_space(str(file))
    for delay in (0, GEOMETRY.depth - 1):
        bound = space.bind(GEOMETRY, delay)
        assert bound.size > 0
        for point in ({}, *bound.enqueued[:3]):
            build(bound.complete(point), GEOMETRY, delay)


def read_config(file: Path) -> None:
    config = gather(tune, {"config": str(file)}, {}).config()
    assert config.study_name
    assert TuneConfig.from_dict(config.to_dict()) == config


def read_plan(file: Path) -> None:
    plan = read_plan_file(str(file), GEOMETRY)
    assert MergePlan.from_json(plan.to_json()) == plan
    assert len(plan.tokens) == plan.geometry.depth + 1
    assert plan.macs >= 0
    assert len(plan.digest) == 16


def documents(found: list[Any], text: Callable[[Any], str]) -> st.SearchStrategy[bytes]:
    whole = st.sampled_from(found).flatmap(mutated).map(text)
    return st.one_of(
        whole.map(lambda one: one.encode(errors="replace")),
        whole.map(lambda one: one.encode(errors="replace")),
        with_bytes([text(one).encode() for one in found]),
    )


SPACE_FILES = [SPACES / f"{name}.toml" for name in space_names()]
CONFIG = {
    "budget_gflops": "60%", "max-drop": 1.5, "trials": 12, "seed": 3, "model": "dsm_tune_demo",
    "model_kwargs": {"qk_norm": True}, "timeout": 10.0, "threads": 2, "device": "cpu", "json": True,
    "study": "a", "latency_stat": "p90", "batch_size": 4, "search_space": "wide",
}  # fmt: skip

# -- labels, images -------------------------------------------------------------------------------

NAMES = ("0/a.png", "0/b.png", "1/c.png", "é.png")
LABELS = [
    b"file,label\n0/a.png,0\n0/b.png,3\n1/c.png,9\n",
    '\ufefflabel,file\r\n1,é.png\r\n\r\n,\r\n2,"0/a.png"\r\n'.encode(),
]


def read_label_file(file: Path) -> None:
    found = read_labels(file.parent, NAMES, 10)
    assert len(found) == len(NAMES)
    assert all(-1 <= label < 10 for label in found)


def pictures() -> list[tuple[str, bytes]]:
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 4), dtype=np.uint8)
    made = []
    for mode, kinds in [("RGB", "JPEG PNG WEBP BMP"), ("L", "JPEG PNG BMP"), ("RGBA", "PNG WEBP")]:
        image = Image.fromarray(noise).convert(mode)
        made += [(kind.lower(), encoded(image, kind)) for kind in kinds.split()]
    made.append(("png", encoded(Image.fromarray(noise).convert("P"), "PNG")))
    made.append(("png", encoded(Image.fromarray(noise[..., 0].astype(np.uint16) * 257), "PNG")))
    return made


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def read_image(file: Path) -> None:
    pixels = load_image(file, MODEL)
    assert pixels.shape == (1, 3, *input_size(MODEL))
    assert bool(pixels.isfinite().all())


# -- checkpoints, bundles -------------------------------------------------------------------------

STATE = {"head.weight": torch.arange(6.0).reshape(2, 3), "head.bias": torch.zeros(2)}


class _Hostile:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch outside",)


def checkpoints() -> list[tuple[str, bytes]]:
    made = [("safetensors", safetensors.torch.save(STATE))]
    for legacy in (False, True):
        for content in (STATE, {"model": STATE, "epoch": 3}):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=not legacy)
            made.append(("pth", file.getvalue()))
    for content in (_Hostile(), {"model": _Hostile()}, [print, eval]):
        made += [("pth", pickle.dumps(content, protocol)) for protocol in (0, 2, 4)]
    return made


def read_checkpoint(file: Path) -> None:
    weights = load_weights(file)
    assert all(isinstance(name, str) for name in weights)
    assert all(isinstance(tensor, torch.Tensor) for tensor in weights.values())


def of_kinds(found: list[tuple[str, bytes]]) -> st.SearchStrategy[tuple[str, bytes]]:
    """One of some files, damaged; now and then under the suffix of another kind."""
    suffixes = sorted({suffix for suffix, _ in found})
    same = {suffix: [content for other, content in found if other == suffix] for suffix in suffixes}
    right = st.sampled_from(suffixes).flatmap(
        lambda suffix: st.tuples(st.just(suffix), damaged(same[suffix]))
    )
    wrong = st.tuples(st.sampled_from(suffixes), with_bytes([content for _, content in found]))
    return st.one_of(right, right, right, wrong)


def read_bundle(folder: Path) -> None:
    found = open_bundle(folder)
    assert found.plan.geometry == GEOMETRY
    assert len(found.pixels) == len(found.outputs)
    with torch.inference_mode():
        assert len(found.merged(found.pixels[:1].to(next(found.dense.parameters()).dtype))) == 1


@dataclasses.dataclass(frozen=True)
class Change:
    """What is done to a bundle.

    Attributes:
        file: whose bytes become ``content``; ``None`` of these removes it.
        manifest: the manifest's keys that are replaced.
        signed: whether the manifest is made to agree with all files again.
    """

    file: str
    content: bytes | None
    manifest: dict[str, Any]
    signed: bool


@pytest.fixture(scope="module", autouse=True)
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that is whole, and from it the last of the subjects."""
    folder = tmp_path_factory.mktemp("bundle") / "whole"
    plan = tome_plan(MODEL, r=9)
    production.export(
        Source(TuneConfig(budget_gflops="100%"), MODEL, plan, {}), "bundle", str(folder)
    )
    contents = {file.name: file.read_bytes() for file in folder.iterdir()}

    def write(change: Change, inside: Path) -> Path:
        for file in folder.iterdir():
            os.link(file, inside / file.name)
        apply(change, inside)
        return inside

    SUBJECTS["bundle"] = Subject(changes(contents), write, read_bundle, few=60, many=1_500)
    return folder


def changes(contents: dict[str, bytes]) -> st.SearchStrategy[Change]:
    texts = ("plan.json", "preprocess.json")
    parsed = {name: json.loads(contents[name]) for name in texts}
    manifest = json.loads(contents["manifest.json"])
    fields = st.sampled_from(("model", "dtype", "tolerance", "made", "files"))
    forged = fields.flatmap(lambda name: mutated({name: manifest[name]}))

    def new_content(name: str) -> st.SearchStrategy[bytes | None]:
        raw = damaged([contents[name]])
        if name in parsed:
            return st.one_of(raw, mutated(parsed[name]).map(lambda one: json_text(one).encode()))
        return st.one_of(raw, raw, raw, raw, st.none())

    names = st.sampled_from((*sorted(contents), *texts, *texts, "model.safetensors"))
    file = names.flatmap(lambda name: st.tuples(st.just(name), new_content(name)))
    return st.builds(
        lambda file, manifest, signed: Change(*file, manifest, signed),
        file,
        st.one_of(st.just({}), st.just({}), forged),
        st.sampled_from((True, True, True, True, False)),
    )


def apply(change: Change, folder: Path) -> None:
    """Change a bundle; its files are links to those of another, so none is written in place."""
    target = folder / change.file
    target.unlink()
    if change.content is not None:
        target.write_bytes(change.content)
    if not change.signed or change.file == "manifest.json":
        return
    body = {**json.loads((folder / "manifest.json").read_bytes()), **change.manifest}
    if isinstance(body.get("files"), dict):
        there = {name: folder / str(name) for name in body["files"] if "\0" not in name}
        digests = {
            n: digest_of(f.read_bytes()) for n, f in there.items() if n in os.listdir(folder)
        }
        body["files"] = {**body["files"], **digests}
    names = [field.name for field in dataclasses.fields(Manifest)]
    (folder / "manifest.json").unlink()
    try:
        forged = Manifest(**{name: body.get(name) for name in names}).to_json()
    except (TypeError, ValueError):
        forged = json_text({**body, "format": FORMAT})
    (folder / "manifest.json").write_bytes(forged.encode(errors="replace"))


SUBJECTS = {
    "space": Subject(
        documents([tomllib.loads(file.read_text()) for file in SPACE_FILES], toml_text),
        written("space.toml"),
        read_space,
        few=350,
        many=20_000,
    ),
    "config": Subject(
        documents([CONFIG], toml_text), written("tune.toml"), read_config, few=350, many=22_000
    ),
    "plan": Subject(
        documents(PLANS, json_text), written("plan.json"), read_plan, few=450, many=24_000
    ),
    "labels": Subject(
        with_bytes(LABELS), written("labels.csv"), read_label_file, few=500, many=15_000
    ),
    "image": Subject(of_kinds(pictures()), write_with_suffix, read_image, few=400, many=10_000),
    "checkpoint": Subject(
        of_kinds(checkpoints()), write_with_suffix, read_checkpoint, few=400, many=8_000
    ),
}
NAMES_OF_SUBJECTS = [*SUBJECTS, "bundle"]


def explore(subject: Subject, folder: Path, cases: int, *, same: bool) -> None:
    """Read so many cases, each under watch."""

    @settings(
        max_examples=cases,
        derandomize=same,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(subject.cases)
    def read(case: Any) -> None:
        inside = folder / "case"
        inside.mkdir()
        try:
            file = subject.write(case, inside)
            with watched():
                subject.read(file)
        except DsmTuneError as error:
            text = str(error)
            assert text.strip(), "an error must say something"
            assert len(text.splitlines()) == 1, text
            assert len(text) < 3000, text
        finally:
            shutil.rmtree(inside)

    read()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", NAMES_OF_SUBJECTS)
def test_a_hostile_file_is_read_or_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    subject = SUBJECTS[name]
    explore(subject, tmp_path, subject.few, same=True)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", NAMES_OF_SUBJECTS)
def test_so_are_a_hundred_thousand(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sum(subject.many for subject in SUBJECTS.values()) >= 100_000
    monkeypatch.chdir(tmp_path)
    explore(SUBJECTS[name], tmp_path, SUBJECTS[name].many, same=False)


# -- that the watch would see it ------------------------------------------------------------------


def test_the_watch_sees_what_must_not_happen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the hostile pickle leaves its file: here it is run
    acts: list[Callable[[], Any]] = [
        lambda: pickle.loads(pickle.dumps(_Hostile())),
        lambda: (tmp_path / "file").write_text("x"),
        lambda: (tmp_path / "folder").mkdir(),
        lambda: os.system("true"),
        lambda: socket.create_connection(("127.0.0.1", 9), timeout=1),
    ]
    for act in acts:
        with pytest.raises(AssertionError), watched(), contextlib.suppress(OSError):
            act()
    with watched():
        (tmp_path / "file").read_text()


def test_a_checkpoint_of_code_is_refused_before_any_of_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for suffix in ("pth", "pt", "safetensors"):
        file = tmp_path / f"weights.{suffix}"
        file.write_bytes(pickle.dumps({"model": _Hostile()}))
        with watched(), pytest.raises(ModelError):
            load_weights(file)
    assert not (tmp_path / "outside").exists()


def test_an_image_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    bomb = encoded(Image.new("1", (15_000, 15_000)), "PNG")
    assert len(bomb) < 200_000
    (tmp_path / "bomb.png").write_bytes(bomb)
    with watched(), pytest.raises(ImagesError, match="at most"):
        load_image(tmp_path / "bomb.png", MODEL)
