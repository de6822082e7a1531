"""``export`` and ``verify``: what a user types, from a plan or a study to a proven bundle."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import REPOSITORY, Ended, contents, run

from dsm_tune.demo import create_model
from dsm_tune.merging.published import dsm_plan, tome_plan


@pytest.fixture
def plan(tmp_path: Path) -> str:
    """A plan for the demo, in a file."""
    file = tmp_path / "plan.json"
    file.write_text(dsm_plan(create_model(), r=20, delay=1, window=7).to_json())
    return str(file)


def test_a_plan_becomes_a_bundle_that_verifies(
    call: Callable[..., Ended], plan: str, tmp_path: Path
) -> None:
    ended = call("export", "--plan", plan, "-o", "out")
    assert ended.code == 0, ended
    assert "dsm-tune verify out" in ended.out
    assert max(map(len, ended.out.splitlines()[1:])) <= 80
    verified = call("verify", "out", "--json")
    assert verified.code == 0, verified
    names = {finding["name"]: finding["status"] for finding in verified.json["findings"]}
    assert names == dict.fromkeys(("files", "outputs", "device", "latency", "quality"), "ok")
    assert verified.json["latency_ms"]["p50"] > 0


def test_verify_of_a_changed_bundle_ends_with_4_and_names_the_file(
    call: Callable[..., Ended], plan: str, tmp_path: Path
) -> None:
    assert call("export", "--plan", plan, "-o", "out", "--json").json["kind"] == "bundle"
    with (tmp_path / "out" / "preprocess.json").open("a") as file:
        file.write(" ")
    ended = call("verify", "out")
    assert ended.code == 4
    assert "preprocess.json" in ended.out
    assert "it does not hold" in ended.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "-o", "out"], "a study, a run or --plan must be given"),
        (["export", "s", "--plan", "p", "-o", "out"], "only one of them"),
        (["export", "nothing", "-o", "out"], "no study store"),
        (["export", "0" * 32, "-o", "out"], "no study store"),
        (["export", "s"], "--output must be given"),
        (["export", "s", "--to", "tflite", "-o", "out"], "bundle, onnx, pt2, mlflow"),
        (["export", "s", "--model", "deit_tiny_patch16_224", "-o", "out"], "--model goes with"),
        (["export", "--plan", "absent.json", "-o", "out"], "absent.json"),
        (["export", "--plan", "/dev/zero", "-o", "out"], "a regular file"),
        (["verify", "absent"], "a bundle must be a folder"),
        (["verify", "x" * 5000], "a bundle must be a folder"),
        (["verify", ".", "--threads", "0"], "threads"),
        (["verify", ".", "--threads", "1000000"], "--threads must be at most 1024"),
        (["verify", "."], "manifest.json"),
    ],
)
def test_what_cannot_be_exported_or_verified_is_one_line(
    call: Callable[..., Ended], tmp_path: Path, arguments: list[str], words: str
) -> None:
    assert words in call(*arguments).error
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_too_long_is_said(call: Callable[..., Ended], plan: str) -> None:
    ended = call("export", "--plan", plan, "-o", "x" * 300)
    assert "--output must have a shorter name" in ended.error


def test_an_export_of_random_weights_says_so(call: Callable[..., Ended], tmp_path: Path) -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval()
    (tmp_path / "plan.json").write_text(tome_plan(model, r=3).to_json())
    made = ["--model", "vit_tiny_patch16_224", "--model-kwargs", "depth=2", "--img-size", "64"]
    ended = call("export", "--plan", "plan.json", *made, "-o", "out")
    assert ended.code == 0, ended
    assert "random weights" in ended.err


def test_a_plan_of_another_model_is_refused(call: Callable[..., Ended], tmp_path: Path) -> None:
    import timm

    other = timm.create_model("vit_tiny_patch16_224").eval()
    (tmp_path / "plan.json").write_text(tome_plan(other, r=3).to_json())
    assert "must be for the geometry" in call("export", "--plan", "plan.json", "-o", "out").error
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_no_plan_is_refused(call: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"format": "nothing"}')
    assert "plan.json" in call("export", "--plan", "plan.json", "-o", "out").error


def test_a_timm_model_is_exported_with_its_checkpoint(
    call: Callable[..., Ended], tmp_path: Path, photographs: Path
) -> None:
    import safetensors.torch
    import timm

    options = {"img_size": 64, "depth": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **options).eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "vit.safetensors")
    (tmp_path / "plan.json").write_text(tome_plan(model, r=3).to_json())
    made = ["--model", "vit_tiny_patch16_224", "--checkpoint", "vit.safetensors"]
    made += ["--model-kwargs", "depth=3", "--img-size", "64"]
    ended = call("export", "--plan", "plan.json", *made, "-o", "out", "--probes", str(photographs))
    assert ended.code == 0, ended
    code = (
        "import dsm_tune, torch\n"
        "print(tuple(dsm_tune.load_bundle('out')(torch.zeros(2, 3, 64, 64)).shape))"
    )
    command = [sys.executable, "-c", code]
    path = {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, cwd=tmp_path, env=path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "(2, 4)"


@pytest.mark.slow
def test_a_study_and_each_run_of_its_front_can_be_exported(tmp_path: Path) -> None:
    arguments = ("--budget-gflops", "60%", "--trials", "6", "--study", "s", "--json")
    tuned = run(*arguments, cwd=tmp_path).json
    chosen = tuned["chosen"]
    before = contents(tmp_path)
    assert run("export", "s", "--to", "onnx", "-o", "chosen", cwd=tmp_path).code == 0
    assert json.loads((tmp_path / "chosen" / "plan.json").read_text()) == chosen["plan"]
    for result in tuned["front"]:
        ended = run("export", result["run_id"], "-o", "one", cwd=tmp_path)
        assert ended.code == 0, ended
        assert json.loads((tmp_path / "one" / "plan.json").read_text()) == result["plan"]
    kept = {name: digest for name, digest in contents(tmp_path).items() if "/" not in name}
    assert kept == {name: digest for name, digest in before.items() if "/" not in name}
    verified = run("verify", "chosen", "--json", cwd=tmp_path)
    assert verified.code == 0, verified
    names = [finding["name"] for finding in verified.json["findings"]]
    assert names == ["files", "outputs", "onnx outputs", "device", "latency", "GMACs", "quality"]
