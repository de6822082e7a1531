"""A bundle gives what was exported, and nothing that was changed since is used."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from demo_sources import demo_plan, demo_source
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dsm_tune
from dsm_tune import production
from dsm_tune.demo import create_model, load_split
from dsm_tune.errors import BundleError, ConfigError, ModelError
from dsm_tune.exporting.bundle import architecture_of, open_bundle, preprocessing_of
from dsm_tune.exporting.folders import written_whole
from dsm_tune.exporting.manifest import FORMAT, MANIFEST, Manifest, digest_of
from dsm_tune.merging.merged import merged
from dsm_tune.verification import Promise, verify

ROOT = Path(__file__).resolve().parents[2]


class Trap:
    """Says so where it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def copied(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def signed_anew(folder: Path, **changes: Any) -> None:
    """Write a manifest that fits the folder, with changes: what an attacker would do."""
    body = json.loads((folder / MANIFEST).read_text())
    for name in ("format", "sha256"):
        body.pop(name)
    body["files"] = {name: digest_of((folder / name).read_bytes()) for name in body["files"]}
    (folder / MANIFEST).write_text(Manifest(**{**body, **changes}).to_json())


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_a_loaded_bundle_gives_the_bits_of_the_merged_model(exported: Path, count: int) -> None:
    images = load_split("holdout")[0][:count]
    with merged(create_model(), demo_plan()) as fast:
        expected = fast(images)
    assert torch.equal(dsm_tune.load_bundle(exported)(images), expected)


def test_a_bundle_holds_these_files_and_knows_its_plan(exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    needed = {"card.md", "manifest.json", "model.safetensors", "plan.json", "preprocess.json"}
    assert names == needed | {"probes.safetensors", "model.onnx", "model.pt2"}
    assert open_bundle(exported).plan == demo_plan()
    assert json.loads((exported / "preprocess.json").read_text())["input_size"] == [3, 28, 28]


def test_the_card_lists_every_step_and_says_how_to_load(exported: Path) -> None:
    card = (exported / "card.md").read_text()
    steps = demo_plan().active_steps
    assert sum(f"| {step.block} | {step.kind} |" in card for step in steps) == len(steps)
    assert "load_bundle" in card


def test_a_bundle_runs_where_torch_timm_and_safetensors_alone_are_installed(exported: Path) -> None:
    absent = ["optuna", "ray", "mlflow", "onnxruntime", "onnx", "onnxscript", "sklearn", "scipy"]
    absent += ["sqlalchemy", "matplotlib", "plotly", "click", "rich", "torchprofile"]
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({absent!r}))\n"
        "import dsm_tune, torch\n"
        f"net = dsm_tune.load_bundle({str(exported)!r})\n"
        "print(tuple(net(torch.zeros(3, 3, 28, 28)).shape))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(3, 10)"


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_of_any_file_is_refused(
    exported: Path, tmp_path: Path, data: st.DataObject
) -> None:
    folder = tmp_path / "changed"
    if not folder.exists():
        shutil.copytree(exported, folder)
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    whole = file.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    flipped = whole[at] ^ data.draw(st.integers(1, 255))
    file.write_bytes(whole[:at] + bytes([flipped]) + whole[at + 1 :])
    try:
        with pytest.raises(BundleError) as refused:
            open_bundle(folder)
        assert "\n" not in str(refused.value)
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors", "model.pt2", MANIFEST])
def test_an_absent_file_is_refused_by_name(exported: Path, tmp_path: Path, name: str) -> None:
    folder = copied(exported, tmp_path)
    (folder / name).unlink()
    with pytest.raises(BundleError, match=name):
        open_bundle(folder)


def test_a_link_to_a_file_elsewhere_is_refused(exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path)
    aside = tmp_path / "plan.json"
    shutil.move(folder / "plan.json", aside)
    (folder / "plan.json").symlink_to(aside)
    with pytest.raises(BundleError, match="regular file"):
        open_bundle(folder)


@pytest.mark.parametrize("name", ["../plan.json", "/etc/passwd", "extra.py"])
def test_a_manifest_that_names_other_files_is_refused(
    exported: Path, tmp_path: Path, name: str
) -> None:
    folder = copied(exported, tmp_path)
    files = dict(Manifest.read(folder).files)
    signed_anew(folder, files={**files, name: "0" * 64})
    with pytest.raises(BundleError, match="no file of a bundle"):
        open_bundle(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "probes.safetensors"])
def test_a_pickle_in_place_of_safetensors_is_refused_and_not_run(
    exported: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(exported, tmp_path)
    monkeypatch.chdir(tmp_path)
    (folder / name).write_bytes(pickle.dumps(Trap()))
    signed_anew(folder)
    with pytest.raises(BundleError, match="safetensors"):
        open_bundle(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "kwargs", [{"checkpoint_path": "evil.pth"}, {"pretrained": True}, {"pretrained_cfg": {}}]
)
def test_a_model_that_would_read_other_files_is_refused(
    exported: Path, tmp_path: Path, kwargs: dict[str, Any]
) -> None:
    folder = copied(exported, tmp_path)
    signed_anew(folder, model={"name": "vit_tiny_patch16_224", "kwargs": kwargs})
    with pytest.raises(BundleError, match="must not name files"):
        open_bundle(folder)


def test_a_model_of_a_hub_is_refused(exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path)
    signed_anew(folder, model={"name": "hf-hub:a/b", "kwargs": {}})
    with pytest.raises(BundleError, match="must not name files or hosts"):
        open_bundle(folder)


def test_a_plan_for_another_model_is_refused(exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path)
    body = json.loads((folder / "plan.json").read_text())
    body["geometry"]["width"] = 64
    (folder / "plan.json").write_text(json.dumps(body))
    signed_anew(folder)
    with pytest.raises(BundleError, match="for another model"):
        open_bundle(folder)


def test_weights_of_another_model_are_refused(exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path)
    signed_anew(folder, model={"name": "vit_tiny_patch16_224", "kwargs": {"num_classes": 10}})
    with pytest.raises(BundleError, match="does not fit"):
        open_bundle(folder)


@pytest.mark.parametrize(
    ("pixels", "outputs"),
    [((2, 3, 8, 8), (2, 10)), ((2, 1, 28, 28), (2, 10)), ((0, 3, 28, 28), (0, 10)), ((2,), (2,))],
)
def test_probes_that_the_model_cannot_be_run_on_are_refused(
    exported: Path, tmp_path: Path, pixels: tuple[int, ...], outputs: tuple[int, ...]
) -> None:
    folder = copied(exported, tmp_path)
    probes = {"pixels": torch.zeros(pixels), "outputs": torch.zeros(outputs)}
    (folder / "probes.safetensors").write_bytes(safetensors.torch.save(probes))
    signed_anew(folder)
    with pytest.raises(BundleError, match=r"probes.safetensors must hold pixels \[n, 3, 28, 28\]"):
        dsm_tune.load_bundle(folder)


def test_a_newer_format_is_named(exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path)
    text = (folder / MANIFEST).read_text().replace(FORMAT, "dsm_tune.bundle/2")
    (folder / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=r"must be dsm_tune.bundle/1, but got"):
        open_bundle(folder)


def test_exporting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    production.export(demo_source(), "bundle", str(folder))
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    production.export(demo_source(), "bundle", str(folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_another_plan_drops_the_formats_of_the_former(exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path)
    production.export(demo_source(demo_plan(5)), "bundle", str(folder))
    assert not (folder / "model.onnx").exists()
    assert open_bundle(folder).plan == demo_plan(5)


def test_the_same_plan_keeps_the_formats_of_the_former(exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path)
    done = production.export(demo_source(), "bundle", str(folder))
    assert {"onnx", "pt2", "bundle"} <= done.proofs.keys()
    assert (folder / "model.onnx").read_bytes() == (exported / "model.onnx").read_bytes()


def test_a_folder_with_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds other files"):
        production.export(demo_source(), "bundle", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("kind", ["bundle", "mlflow"])
def test_a_folder_that_only_looks_like_an_export_is_not_replaced(tmp_path: Path, kind: str) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "my web app"}')
    (tmp_path / "MLmodel").write_text("flavors: {}")
    with pytest.raises(ConfigError, match="holds other files"):
        production.export(demo_source(), kind, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["MLmodel", "manifest.json"]


def test_a_bundle_with_somebodys_files_in_it_is_not_replaced(
    exported: Path, tmp_path: Path
) -> None:
    folder = copied(exported, tmp_path)
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        production.export(demo_source(), "bundle", str(folder))
    assert (folder / "notes" / "mine.txt").read_text() == "mine"


def test_nothing_beside_the_folder_is_removed(tmp_path: Path) -> None:
    others = [".out.2024", ".foo.1999", ".out.dsm_tune-export.elsewhere.1999"]
    for name in others:
        (tmp_path / name).mkdir()
    with written_whole(tmp_path / "out") as fresh:
        (fresh / "file").write_text("new")
    with written_whole(tmp_path / "*") as fresh:
        (fresh / "file").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "out", "*"])


def test_a_model_of_other_sizes_than_its_plan_is_refused_before_it_is_made(
    exported: Path, tmp_path: Path
) -> None:
    folder = copied(exported, tmp_path)
    signed_anew(folder, model={"name": "vit_tiny_patch16_224", "kwargs": {"depth": 10**6}})
    with pytest.raises(BundleError, match="differ in depth"):
        open_bundle(folder)


def test_what_does_not_give_the_eager_outputs_is_not_kept(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(exported, tmp_path)
    before = (folder / MANIFEST).read_bytes()

    def wrong(kind: str, file: Path, threads: int) -> Any:
        return lambda pixels: torch.zeros(len(pixels), 10)

    monkeypatch.setattr("dsm_tune.exporting.formats.opened", wrong)
    with pytest.raises(ModelError, match="nothing was exported"):
        production.export(demo_source(demo_plan(5)), "onnx", str(folder))
    assert (folder / MANIFEST).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_timm_model_with_arguments_is_made_again_by_its_bundle(tmp_path: Path) -> None:
    import timm

    kwargs = {"img_size": 64, "depth": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **kwargs).eval()
    found = architecture_of(model, "vit_tiny_patch16_224.augreg_in21k", kwargs)
    assert found == {"name": "vit_tiny_patch16_224", "kwargs": {**kwargs, "num_classes": 7}}


def test_a_model_that_its_name_does_not_make_is_refused() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", depth=3).eval()
    with pytest.raises(ModelError, match="make its model again"):
        architecture_of(model, "vit_tiny_patch16_224", {})


def test_verify_on_another_device_warns_and_measures_anew(exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path)
    described = {"name": "another processor", "threads": 512}
    signed_anew(folder, made={"device": {"name": "another", "described": described}})
    verdict = verify(str(folder), seconds=0.5)
    found = {finding.name: finding for finding in verdict.findings}
    assert found["device"].status == "warning"
    assert "another processor" in found["device"].detail
    assert verdict.latency_ms is not None
    assert verdict.holds


@pytest.mark.parametrize(
    ("limits", "fails"),
    [({"ms": 1e-6}, "latency"), ({"ms_share": 1e-6}, "latency"), ({"gmacs": 1e-6}, "GMACs")],
)
def test_verify_fails_where_the_budget_is_not_met(
    exported: Path, tmp_path: Path, limits: dict[str, float], fails: str
) -> None:
    folder = copied(exported, tmp_path)
    signed_anew(folder, made={"limits": limits})
    verdict = verify(str(folder), seconds=0.5)
    assert [finding.name for finding in verdict.findings if finding.status == "failed"] == [fails]
    assert not verdict.holds


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_verify_times_on_the_cpu_what_was_tuned_for_a_device_that_is_not_here(
    exported: Path, tmp_path: Path
) -> None:
    folder = copied(exported, tmp_path)
    signed_anew(folder, made={"serving": {"device": "cuda"}})
    verdict = verify(str(folder), seconds=0.5)
    assert "timed on the CPU" in {one.name: one.detail for one in verdict.findings}["device"]
    assert verdict.holds
    with pytest.raises(ConfigError, match="--device"):
        verify(str(folder), device="cuda", seconds=0.5)


def test_verify_fails_where_a_format_cannot_be_opened(exported: Path, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path)
    (folder / "model.onnx").write_bytes(b"no graph")
    (folder / "model.pt2").write_bytes(b"no archive")
    signed_anew(folder)
    failed = [one.name for one in verify(str(folder), seconds=0.5).findings if one.status != "ok"]
    assert failed == ["onnx outputs", "pt2 outputs"]


@pytest.mark.parametrize(
    "made",
    [
        {"limits": {"ms": 10**330}},
        {"limits": {"ms": True}},
        {"limits": {"gmacs": -1}},
        {"serving": {"batch_size": 10**9}},
        {"threads": 10**6},
    ],
)
def test_a_manifest_that_promises_what_no_export_does_is_refused(made: dict[str, Any]) -> None:
    with pytest.raises(BundleError):
        Promise.of(made)


def test_verify_fails_where_outputs_or_quality_are_not_those_promised(
    exported: Path, tmp_path: Path
) -> None:
    folder = copied(exported, tmp_path)
    probes = safetensors.torch.load_file(folder / "probes.safetensors")
    probes["outputs"] = probes["outputs"] + 1
    safetensors.torch.save_file(probes, folder / "probes.safetensors")
    signed_anew(folder, made={"exported": {"divergence": 0.0, "divergence_high": 0.0}})
    failed = {
        finding.name
        for finding in verify(str(folder), seconds=0.5).findings
        if finding.status == "failed"
    }
    assert failed == {"outputs", "onnx outputs", "pt2 outputs", "quality"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
KNOWN = ("runtime", "batch_size", "device", "ms", "ms_share", "gmacs", "divergence_high")


@given(
    st.fixed_dictionaries(
        {},
        optional={
            **{
                name: JSON | st.dictionaries(st.sampled_from((*KNOWN, "described")), JSON)
                for name in ("serving", "limits", "exported", "device")
            },
            "threads": JSON,
            "stat": JSON,
        },
    )
)
def test_any_promise_is_read_or_refused_in_one_line(made: dict[str, Any]) -> None:
    try:
        promise = Promise.of(made)
    except BundleError as error:
        assert "\n" not in str(error)
    else:
        assert promise.batch_size >= 1
        assert promise.stat in ("p50", "p90", "p99")


@pytest.mark.parametrize("number", ["1e999", "NaN", "-Infinity"])
def test_a_number_that_json_does_not_have_is_refused(
    exported: Path, tmp_path: Path, number: str
) -> None:
    folder = copied(exported, tmp_path)
    text = (folder / MANIFEST).read_text().replace('"tolerance": 0.0001', f'"tolerance": {number}')
    (folder / MANIFEST).write_text(text)
    with pytest.raises(BundleError):
        open_bundle(folder)


def test_the_current_folder_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = tmp_path / "out" / "below"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    for output in (".", str(tmp_path / "out")):
        with pytest.raises(ConfigError, match="current folder"):
            production.export(demo_source(), "bundle", output)


def test_a_bundle_keeps_the_transform_of_what_was_exported(tmp_path: Path) -> None:
    model = create_model()
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "crop_pct": 0.5}
    source = dataclasses.replace(demo_source(), model=model)
    production.export(source, "bundle", str(tmp_path / "out"))
    kept = preprocessing_of(open_bundle(tmp_path / "out").dense)
    assert tuple(kept["mean"]) == (0.1, 0.2, 0.3)
    assert kept["crop_pct"] == 0.5


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, "tests/exporting")
import torch
torch.set_num_threads(1)
from demo_sources import demo_plan
from dsm_tune.demo import create_model
from dsm_tune.exporting import bundle
from dsm_tune.exporting.folders import written_whole
folder, draw = Path(sys.argv[1]), random.Random(0)
model, plans = create_model(), (demo_plan(20), demo_plan(5))
made = dict(architecture={"name": "dsm_tune_demo", "kwargs": {}}, made={}, card="", tolerance=0.1)
probes = torch.zeros(1, 3, 28, 28), torch.zeros(1, 10)
def write(plan):
    with written_whole(folder) as fresh:
        bundle.write(fresh, model, plan, probes=probes, **made)
write(plans[0])
start = time.monotonic()
write(plans[0])
takes, seen = time.monotonic() - start, set()
for round in range(25):
    child = os.fork()
    if not child:
        while True:
            for plan in plans:
                write(plan)
    time.sleep(draw.uniform(0.0, 4 * takes))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    seen.add(bundle.open_bundle(folder).plan)
write(plans[0])
print(len(seen), sorted(path.name for path in folder.parent.iterdir()))
"""


def test_an_export_that_is_killed_leaves_the_old_bundle_or_the_new_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "bundle")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    kinds, left = done.stdout.split(maxsplit=1)
    assert int(kinds) == 2
    assert left.strip() == "['bundle']"
