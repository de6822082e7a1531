"""`bench` puts methods, plans and other models side by side."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
from command_line import Ended, contents
from safetensors.torch import save_file

from dsm_tune import demo, methods, tome_plan
from dsm_tune.errors import PlanError
from dsm_tune.merging.backbone import read_geometry
from dsm_tune.plan import MergePlan

Call = Callable[..., Ended]
QUICK = ("--runs", "3", "--batch-size", "2", "--threads", "1", "-q")
OTHER = "test_resnet"  # timm's own model for tests


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    file = tmp_path / "mine.json"
    file.write_text(tome_plan(demo.create_model(), 20).to_json())
    return file


def test_all_candidates_stand_side_by_side_in_every_output(call: Call, plan_file: Path) -> None:
    ended = call(
        *("bench", *QUICK, "--r", "10,30", "--plan", str(plan_file), "--compare", OTHER),
        *("--json", "--csv", "all.csv", "--plot", "all.svg"),
    )
    assert ended.code == 0, ended
    document = ended.json
    assert document["images"] == {"count": 398, "labelled": True}
    rows = {one["name"]: one for one in document["candidates"]}
    delay = document["delay"]
    expected = [
        *("dense", "ToMe r=10", f"DSM r=10 D={delay}", "ToMe r=30", f"DSM r=30 D={delay}"),
        *("mine", OTHER),
    ]
    assert list(rows) == expected
    dense = rows["dense"]
    for name, one in rows.items():
        (timing,) = one["timings"]
        assert timing["latency_ms"]["p50"] <= timing["latency_ms"]["p90"], name
        assert timing["speedup_q25"] <= timing["speedup"] <= timing["speedup_q75"]
        assert timing["throughput"] == pytest.approx(2e3 / timing["latency_ms"]["p50"])
        share = dense["gmacs"] / one["gmacs"]
        assert timing["efficiency"] == pytest.approx(timing["speedup"] / share)
        assert timing["peak_mib"] > 0
        assert one["gmacs_counted"] == pytest.approx(one["gmacs"], rel=0.002)
        if one["plan"] is not None:
            assert MergePlan.from_dict(one["plan"]).gmacs == one["gmacs"]
    assert dense["timings"][0]["speedup"] == 1
    assert dense["quality"]["divergence"] == 0
    assert rows["ToMe r=10"]["quality"]["divergence"] > 0
    assert rows[OTHER]["quality"] is None  # its weights are random
    with Path("all.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [row["name"] for row in table] == expected
    assert float(table[1]["speedup"]) == rows["ToMe r=10"]["timings"][0]["speedup"]
    assert "<svg" in Path("all.svg").read_text()


def test_random_weights_have_speed_and_gmacs_and_no_quality(call: Call, photographs: Path) -> None:
    quick = ("bench", "--model", "test_vit", "--images", str(photographs), "--r", "9", *QUICK[:-1])
    ended = call(*quick)
    assert ended.code == 0, ended
    assert "weights are random" in ended.err
    assert "No quality: the weights are random" in ended.out
    assert "top-1" not in ended.out
    assert "ToMe r=9" in ended.out
    assert max(map(len, ended.out.splitlines())) <= 80


def test_another_model_with_weights_is_judged_on_the_same_labelled_images(
    call: Call, photographs: Path
) -> None:
    for name in ("test_vit", OTHER):
        save_file(timm.create_model(name).state_dict(), f"{name}.safetensors")
    rows = [f"{number}.jpg,{number}\n" for number in range(6)]
    (photographs / "labels.csv").write_text("file,label\n" + "".join(rows))
    ended = call(
        *("bench", *QUICK, "--model", "test_vit", "--checkpoint", "test_vit.safetensors", "--json"),
        *("--images", str(photographs), "--compare", f"{OTHER}={OTHER}.safetensors"),
        *("--plot", "all.png"),
    )
    assert ended.code == 0, ended
    assert ended.json["images"] == {"count": 3, "labelled": True}
    *_, other = ended.json["candidates"]
    assert other["quality"].keys() == {"top1"}  # how near it is to dense says nothing of it
    assert 0 <= other["quality"]["top1"] <= 1


@pytest.mark.slow
def test_onnx_runtime_runs_plans_and_other_models(call: Call) -> None:
    pytest.importorskip("onnxruntime")
    batches = ("--runs", "3", "--batch-size", "1,2", "--threads", "1", "-q", "--runtime", "onnx")
    ended = call("bench", *batches, "--r", "30", "--compare", OTHER, "--json")
    assert ended.code == 0, ended
    for one in ended.json["candidates"]:
        assert [timing["batch_size"] for timing in one["timings"]] == [1, 2]
        assert all(timing["peak_mib"] is None for timing in one["timings"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--r", "4,x"], "--r must be integers >= 1 between commas, such as 4,8,16"),
        (["--r", "0"], "--r must be integers >= 1"),
        (["--r", ""], "--r must be integers >= 1"),
        (["--r", "4,,8"], "--r must be integers >= 1"),
        (["--batch-size", "-2"], "--batch-size must be integers >= 1"),
        (["--runs", "2"], "--runs must be from 3 to 1000000, but got 2"),
        (["--plan", "no.json"], "--plan must be a readable file, but no.json: No such file"),
        (["--plan", "bad.json"], "bad.json: a plan must be a JSON object"),
        (["--plan", "else.json"], "its depth is 6 and the model's 5"),
        (["--run", "0123456789"], "--run must be the MLflow run of one trial in"),
        (["--compare", "resnet1552"], "but got 'resnet1552'; did you mean 'resnet152'"),
        (["--compare", f"{OTHER}=no.pth"], "--checkpoint must be a file, but got 'no.pth'"),
        (["--local-blocks", "-1"], "local_blocks must be an integer >= 0, but got -1"),
        (["--inflection", "2"], "inflection must be a number from -1 to 1, but got 2"),
        (["--plot", "a.gif"], "--plot must end in .png or .svg, but got 'a.gif'"),
        (["--csv", "no/such.csv"], "--csv must be a file that can be written"),
        (["--runtime", "cudagraphs", "--device", "cpu"], "accepted are eager, onnx"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    call: Call, arguments: list[str], expected: str
) -> None:
    geometry = read_geometry(demo.create_model())
    Path("bad.json").write_text("[")
    deeper = dataclasses.replace(geometry, depth=6)
    Path("else.json").write_text(MergePlan("", deeper).to_json())
    before = contents(Path.cwd())
    assert expected in call("bench", "-q", "--threads", "1", *arguments).error
    assert contents(Path.cwd()) == before


def test_the_default_r_is_the_patches_over_the_depth() -> None:
    geometry = read_geometry(demo.create_model())
    deit = dataclasses.replace(geometry, depth=12)
    assert [methods.default_r(one) for one in (geometry, deit)] == [39, 16]
    assert methods.default_r(dataclasses.replace(geometry, depth=200)) == 1


class _Stored:
    """A study with one trial, as far as a run is looked up."""

    facts: dict[str, object] = {"run_ids": {"3": "0123456789abcdef"}}  # noqa: RUF012

    def __init__(self, plan: MergePlan) -> None:
        self.plan = plan

    def records(self) -> list[object]:
        return [type("Record", (), {"number": 3, "plan": self.plan})()]


def test_a_run_is_found_by_its_first_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tome_plan(demo.create_model(), 20)
    monkeypatch.setattr(methods, "study_names", lambda _: ["one"])
    monkeypatch.setattr(methods, "load_study", lambda *_: _Stored(plan))
    assert methods.plan_of_run("01234567", "sqlite:///x.db", plan.geometry) == plan
    other = dataclasses.replace(plan.geometry, width=64)
    with pytest.raises(PlanError, match="run 01234567: a plan must be for the geometry"):
        methods.plan_of_run("01234567", "sqlite:///x.db", other)
