"""Files for other programs give what the merged model gives."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from demo_sources import demo_plan, demo_source
from torch import Tensor

from dsm_tune import production
from dsm_tune.demo import create_model, load_split
from dsm_tune.errors import BundleError, ConfigError, DsmTuneError, ModelError
from dsm_tune.exporting import formats
from dsm_tune.exporting.proof import compared
from dsm_tune.merging.merged import merged_view
from dsm_tune.merging.published import tome_plan
from dsm_tune.reviewing.stores import connect

ROOT = Path(__file__).resolve().parents[2]


@torch.no_grad()
@pytest.mark.parametrize("kind", formats.FILES)
def test_a_format_gives_the_eager_outputs_at_every_batch_size(exported: Path, kind: str) -> None:
    images = load_split("holdout")[0][:64]
    expected = merged_view(create_model(), demo_plan())(images)
    run = formats.opened(kind, exported / formats.FILES[kind], 1)
    proof = compared(run, images, expected, 1e-4)
    assert proof.images >= 4 * 64
    assert proof.holds, proof


@torch.no_grad()
@pytest.mark.parametrize("kind", formats.FILES)
def test_images_whose_sides_are_no_multiple_of_the_patch_keep_their_size(
    kind: str, tmp_path: Path
) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=70, depth=2, num_classes=3).eval()
    plan = tome_plan(model, r=3)
    formats.write_format(kind, model, plan, tmp_path)
    images = torch.randn(2, 3, 70, 70, generator=torch.Generator().manual_seed(0))
    found = formats.opened(kind, tmp_path / formats.FILES[kind], 1)(images)
    torch.testing.assert_close(found, merged_view(model, plan)(images), rtol=1e-4, atol=1e-4)


def test_the_onnx_file_says_how_to_preprocess_and_which_plan_it_runs(exported: Path) -> None:
    model = onnx.load(exported / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    known = {prop.key: prop.value for prop in model.metadata_props}
    numbers = json.loads(known["dsm_tune.preprocessing"])
    assert numbers == json.loads((exported / "preprocess.json").read_text())
    assert known["dsm_tune.plan"] == (exported / "plan.json").read_text()


def test_a_tool_that_replaces_weights_of_the_onnx_file_can_infer_its_shapes(exported: Path) -> None:
    model = onnx.load(exported / "model.onnx")
    for weights in model.graph.initializer:
        if weights.name.endswith("head.weight"):
            (node,) = [node for node in model.graph.node if weights.name in node.input]
            (transposed,) = [one for one in node.attribute if one.name == "transB"]
            array = onnx.numpy_helper.to_array(weights)
            weights.CopyFrom(onnx.numpy_helper.from_array(array.T.copy(), weights.name))
            transposed.i = 0
            break
    else:
        raise AssertionError("the head has no weights")
    onnx.shape_inference.infer_shapes(model, strict_mode=True)


def test_pt2_runs_where_dsm_tune_and_timm_are_not(exported: Path) -> None:
    code = (
        "import sys, warnings\nwarnings.simplefilter('ignore')\n"
        "sys.modules['dsm_tune'] = sys.modules['timm'] = None\n"
        "import torch\n"
        f"net = torch.export.load({str(exported / 'model.pt2')!r}).module()\n"
        "print(tuple(net(torch.zeros(5, 3, 28, 28)).shape))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(5, 10)"


def test_no_path_of_this_machine_is_in_what_is_exported(exported: Path) -> None:
    for file in exported.iterdir():
        assert str(ROOT).encode() not in file.read_bytes(), file.name


def test_what_is_no_pt2_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"no archive")
    with pytest.raises(BundleError, match="pt2 file"):
        formats.opened("pt2", tmp_path / "model.pt2", 1)


def test_onnx_of_half_precision_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    source = demo_source()
    half = dataclasses.replace(
        source,
        config=dataclasses.replace(source.config, dtype="float16"),
        model=create_model().half(),
    )
    with pytest.raises(ModelError, match="float32"):
        production.export(half, "onnx", str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_may_hold_half_precision_where_its_classes_are_those_of_float32(
    tmp_path: Path,
) -> None:
    source = demo_source()
    config = dataclasses.replace(source.config, dtype="bfloat16")
    half = dataclasses.replace(source, config=config, model=create_model().bfloat16())
    done = production.export(half, "bundle", str(tmp_path / "out"))
    assert done.proofs["bundle"].holds


@pytest.mark.parametrize(("apart", "holds"), [(0, True), (1, True), (2, False)])
def test_one_image_of_ten_may_be_apart_and_no_more(apart: int, holds: bool) -> None:
    expected = torch.eye(10)
    found = expected.clone()
    found[:apart] += 0.5
    index = torch.arange(10.0)[:, None]
    proof = compared(lambda x: found[x[:, 0].long()], index, expected, 1e-3, (10,))
    assert (proof.apart, proof.holds) == (apart, holds)


def test_an_output_that_is_no_number_is_apart() -> None:
    expected = torch.ones(4, 2)
    nothing = torch.full((4, 2), torch.nan)
    proof = compared(lambda x: nothing, torch.ones(4, 1), expected, 1e-3, (4,))
    assert not proof.holds


PREDICT = """
import sys, warnings
warnings.simplefilter("ignore")
import mlflow, numpy
mlflow.set_tracking_uri(sys.argv[2])
images = numpy.load("images.npy")
numpy.save("found.npy", mlflow.pyfunc.load_model(sys.argv[1]).predict({"pixels": images})["logits"])
"""


def _predicted(where: str, images: Tensor, folder: Path, tracking_uri: str) -> Tensor:
    """What a loaded MLflow model gives, in a process of its own, as a server has it."""
    np.save(folder / "images.npy", images.numpy())
    command = [sys.executable, "-c", PREDICT, where, tracking_uri]
    subprocess.run(command, cwd=folder, capture_output=True, check=True)
    return torch.from_numpy(np.load(folder / "found.npy"))


def test_an_mlflow_model_predicts_the_eager_logits(tmp_path: Path) -> None:
    production.export(demo_source(), "mlflow", str(tmp_path / "model"))
    images = load_split("holdout")[0][:5]
    found = _predicted(str(tmp_path / "model"), images, tmp_path, f"sqlite:///{tmp_path}/m.db")
    with torch.no_grad():
        expected = merged_view(create_model(), demo_plan())(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_registered_model_is_the_champion_and_the_former_one_is_kept(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    images = load_split("holdout")[0][:5]
    options = {"register": "digits", "tracking_uri": uri}
    for plan in (demo_plan(20), demo_plan(5)):
        source, folder = demo_source(plan), str(tmp_path / "bundle")
        done = production.export(source, "bundle", folder, **options)
    assert (done.registered, done.version) == ("digits", "2")
    aliases = dict(connect(uri).get_registered_model("digits").aliases)
    assert {name: str(version) for name, version in aliases.items()} == {
        "champion": "2",
        "previous": "1",
    }
    found = _predicted("models:/digits@champion", images, tmp_path, uri)
    with torch.no_grad():
        expected = merged_view(create_model(), demo_plan(5))(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["", "a/b", "a:b", " "])
def test_a_name_that_no_registered_model_can_have_is_refused_at_once(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigError, match="--register"):
        production.export(demo_source(), "bundle", str(tmp_path / "out"), register=name)
    assert list(tmp_path.iterdir()) == []


def test_a_registry_that_does_not_answer_is_said_before_anything_is_written(tmp_path: Path) -> None:
    for uri in ("http://127.0.0.1:1", "nonsense", "sqlite:////proc/none/mlflow.db"):
        with pytest.raises(DsmTuneError):
            production.export(
                demo_source(), "bundle", str(tmp_path / "out"), register="digits", tracking_uri=uri
            )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@torch.no_grad()
def test_inductor_compiles_the_pt2_file_to_native_code_with_the_same_outputs(
    exported: Path, tmp_path: Path
) -> None:
    # In a process of its own: Inductor warns of much, and keeps threads and caches.
    code = (
        "import torch\n"
        f"program = torch.export.load({str(exported / 'model.pt2')!r})\n"
        f"path = {str(tmp_path / 'native.pt2')!r}\n"
        "torch._inductor.aoti_compile_and_package(program, package_path=path)\n"
        "run = torch._inductor.aoti_load_package(path)\n"
        f"images = torch.load({str(tmp_path / 'images.pt')!r})\n"
        f"torch.save(torch.cat([run(images[:3]), run(images[3:])]), {str(tmp_path / 'out.pt')!r})"
    )
    images = load_split("holdout")[0][:10]
    torch.save(images, tmp_path / "images.pt")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    found = torch.load(tmp_path / "out.pt")
    expected = merged_view(create_model(), demo_plan())(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
