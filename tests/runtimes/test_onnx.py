"""An exported model gives what the eager one gives, from one file, for any batch."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "merging"))

from small_vits import KINDS, images_for, plan_for, small_vit

from dsm_tune.demo import create_model, load_split
from dsm_tune.errors import ConfigError, ModelError, PlanError
from dsm_tune.merging.merged import merged
from dsm_tune.merging.published import dsm_plan, tome_plan
from dsm_tune.plan import Matching, MergePlan
from dsm_tune.runtimes.onnx import graph
from dsm_tune.runtimes.onnx.files import PLAN_KEY, export_onnx, session
from dsm_tune.runtimes.onnx.graph import INPUT, OUTPUT, graph_of
from dsm_tune.runtimes.onnx.pieces import Pieces

BATCHES = (1, 2, 7, 32)
# Dense operators, and those that match and merge; ONNX Runtime and TensorRT 10 take them all.
ALLOWED = {
    "Add",
    "And",
    "ArgMax",
    "Cast",
    "Clip",
    "Concat",
    "Constant",
    "Conv",
    "Div",
    "Equal",
    "Expand",
    "Flatten",
    "Floor",
    "Gather",
    "GatherElements",
    "Gelu",
    "Gemm",
    "LayerNormalization",
    "Less",
    "Log",
    "LpNormalization",
    "MatMul",
    "Max",
    "Mul",
    "Pow",
    "Range",
    "Reciprocal",
    "ReduceMax",
    "ReduceMean",
    "ReduceSum",
    "Relu",
    "Reshape",
    "ScatterElements",
    "Shape",
    "Slice",
    "Softmax",
    "Split",
    "Sqrt",
    "Squeeze",
    "TopK",
    "Transpose",
    "Unsqueeze",
    "Where",
}
LOCAL = [(0, "merge", 5, 3), (1, "merge", 4, 5)]
MIXED = [(0, "merge", 5, 3), (1, "prune", 4, None), (2, "merge", 3, 5)]
FUSED = [(0, "fuse", 5, None), (1, "merge", 4, 3), (2, "fuse", 6, None), (3, "prune", 2, None)]
TUNED = Matching(salience=0.3, size_penalty=0.1, attention_weight=1.0, norm="mean")


def _same_logits(found: Tensor, expected: Tensor) -> None:
    """Near-ties may break differently on one image of ten."""
    apart = ((found - expected).abs() > 1e-4).any(dim=1)
    assert found.shape == expected.shape
    assert int(apart.sum()) <= len(found) // 10


pieces_of = functools.lru_cache(maxsize=16)(Pieces)  # a model is traced once for all tests


@torch.no_grad()
def _check(model: nn.Module, plan: MergePlan, images: Tensor) -> None:
    """Compare graph and eager model at every batch size, and look into the graph."""
    content = graph_of(pieces_of(model), plan)
    with merged(model, plan) as fast:
        expected = fast(images)
    forward = session(content.SerializeToString(), 1)
    for batch in BATCHES:
        _same_logits(forward(images[:batch]), expected[:batch])
    onnx.checker.check_model(content, full_check=True)
    _only_allowed(content)


def _only_allowed(content: onnx.ModelProto) -> None:
    assert {node.op_type for node in content.graph.node} <= ALLOWED
    assert {node.domain for node in content.graph.node} <= {""}
    assert [(item.domain, len(content.functions)) for item in content.opset_import] == [("", 0)]
    kinds = {tensor.data_type for tensor in content.graph.initializer}
    kinds |= {value.type.tensor_type.elem_type for value in content.graph.value_info}
    assert onnx.TensorProto.DOUBLE not in kinds
    for node in content.graph.node:
        assert not any(a.name == "to" and a.i == onnx.TensorProto.DOUBLE for a in node.attribute)


QUICK = ("distilled", "avg_prefix")
MATCHINGS = {
    "equal_quota": (LOCAL, Matching()),
    "free_quota": (LOCAL, Matching(quota="free")),
    "centroid": (LOCAL, Matching(position="centroid")),
    "tuned": (LOCAL, TUNED),
    "received": (LOCAL, dataclasses.replace(TUNED, attention="received", norm="largest")),
    "steep": (LOCAL, dataclasses.replace(TUNED, attention_weight=0.5, feature="kv_all")),
    "random": (LOCAL, Matching(feature="random", seed=3)),
    "random_prune": (MIXED, Matching(feature="random", seed=3, size_penalty=0.1)),
    "prune_norm": (MIXED, Matching(feature="x")),
    "prune_class": (MIXED, Matching(prune_score="class", position="centroid")),
    "prune_ats": (MIXED, Matching(prune_score="ats")),
    "fuse_norm": (FUSED, Matching(feature="v", norm="mean")),
    "fuse_class": (FUSED, Matching(prune_score="class", norm="largest")),
    "fuse_ats": (FUSED, Matching(prune_score="ats", position="centroid")),
    "prune_received": (MIXED, Matching(prune_score="received", feature="kv")),
}


@pytest.mark.parametrize("name", MATCHINGS)
def test_every_sort_of_matching_gives_the_eager_logits(name: str) -> None:
    steps, matching = MATCHINGS[name]
    model = small_vit("class", (6, 6), 4)
    last = "all" if any(step[0] == 3 for step in steps) else "prefix"
    plan = plan_for(model, *steps, matching=matching, last_block=last)
    _check(model, plan, images_for(model, 32))


@pytest.mark.parametrize(
    "kind",
    [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
def test_every_kind_of_model_gives_the_eager_logits(kind: str) -> None:
    model = small_vit(kind, (5, 6), 3)
    _check(model, plan_for(model, *LOCAL, (2, "merge", 6, None)), images_for(model, 32))


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [(0, "merge", 99, None), (1, "merge", 99, 2), (2, "prune", 99, None)],
        [(1, "fuse", 99, None)],
    ],
    ids=["dense", "all_there_is", "all_in_one"],
)
def test_nothing_and_all_there_is_can_leave(steps: Any) -> None:
    model = small_vit("class", (5, 5), 3)
    plan = plan_for(model, *steps, proportional_attention=False)
    _check(model, plan, images_for(model, 32))


def test_the_demo_model_gives_the_eager_logits_and_answers() -> None:
    model, (images, labels) = create_model(), load_split("holdout")
    plan = dsm_plan(model, 30)
    _check(model, plan, images[:32])
    content = graph_of(pieces_of(model), plan).SerializeToString()
    answers = session(content, 1)(images).argmax(dim=1)
    assert (answers == labels).float().mean() > 0.9


def test_blocks_that_are_built_alike_are_traced_once_for_all_plans() -> None:
    pieces = Pieces(small_vit("class", (4, 4), 4))
    for r in (1, 2):
        graph_of(pieces, plan_for(pieces.model, (1, "merge", r, None), (2, "prune", r, None)))
    # A stem, attention with and without sizes, an MLP half, and a head.
    assert len(pieces._traced) == 5


@pytest.mark.parametrize("merges", [tome_plan, dsm_plan])
def test_a_deit_gives_the_eager_logits(merges: Any) -> None:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", depth=4).eval()
    images = torch.randn(32, 3, 224, 224)
    _check(model, merges(model, 16), images)


def test_a_file_says_what_it_takes_and_what_it_is(tmp_path: Path) -> None:
    model = small_vit(depth=2)
    plan = plan_for(model, (1, "merge", 3, None))
    export_onnx(model, plan, tmp_path / "a.onnx", metadata={"card": "measured nowhere"})
    content = onnx.load(tmp_path / "a.onnx")
    notes = {note.key: note.value for note in content.metadata_props}
    assert MergePlan.from_json(notes[PLAN_KEY]) == plan
    assert notes["card"] == "measured nowhere"
    sides = content.graph.input[0].type.tensor_type.shape.dim
    assert [content.graph.input[0].name, content.graph.output[0].name] == [INPUT, OUTPUT]
    assert [side.dim_param or side.dim_value for side in sides] == ["batch", 3, 8, 8]
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


def test_exporting_is_silent_and_leaves_the_model_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = small_vit(depth=2)
    images = images_for(model)
    with torch.no_grad():
        before = model(images)
        export_onnx(model, plan_for(model, (1, "merge", 3, None)), tmp_path / "a.onnx")
        assert torch.equal(model(images), before)
    assert capfd.readouterr() == ("", "")


def test_a_merging_block_has_few_nodes(tmp_path: Path) -> None:
    model = small_vit("class", (6, 6), 2)
    counts = []
    for steps in [(0, "merge", 2, None), (1, "merge", 2, None)], [(0, "merge", 2, None)]:
        export_onnx(model, plan_for(model, *steps), tmp_path / "a.onnx")
        counts.append(len(onnx.load(tmp_path / "a.onnx").graph.node))
    assert counts[0] - counts[1] <= 50


@pytest.fixture
def no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter that gives nothing that the checker accepts, and gives it fast."""
    monkeypatch.setattr(graph, "graph_of", lambda *_: onnx.ModelProto())


@pytest.mark.usefixtures("no_graph")
def test_a_failed_export_leaves_no_file_and_keeps_an_old_one(tmp_path: Path) -> None:
    model = small_vit()
    (tmp_path / "old.onnx").write_bytes(b"old")
    for name in ("new.onnx", "old.onnx"):
        with pytest.raises(onnx.checker.ValidationError):
            export_onnx(model, plan_for(model), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old.onnx"]
    assert (tmp_path / "old.onnx").read_bytes() == b"old"


@pytest.mark.usefixtures("no_graph")
def test_a_file_that_cannot_be_put_in_place_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_vit()
    monkeypatch.setattr(onnx.checker, "check_model", lambda _: None)
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        export_onnx(model, plan_for(model), tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_models_that_cannot_be_exported_are_refused(tmp_path: Path) -> None:
    model, file = small_vit(depth=2), tmp_path / "a.onnx"
    half = timm.create_model("vit_tiny_patch16_224", depth=1).eval().half()
    with pytest.raises(ModelError, match=r"float32 on the CPU .*, but got torch\.float16 on cpu"):
        export_onnx(half, tome_plan(half, 4), file)
    with pytest.raises(ModelError, match="eval mode"):
        export_onnx(half.float().train(), tome_plan(half, 4), file)
    with pytest.raises(PlanError, match="the plan is for"):
        export_onnx(model, tome_plan(half, 4), file)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_what_installs_it(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package}, which is .*'dsm-tune\[onnx\]'"):
        export_onnx(small_vit(depth=2), plan_for(small_vit(depth=2)), tmp_path / "a.onnx")


def test_a_missing_runtime_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"onnxruntime, which is .*'dsm-tune\[onnx\]'"):
        session(b"", 1)


def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    for content in (b"no model", tmp_path / "absent.onnx"):
        with pytest.raises(ModelError, match="an ONNX model must be readable") as refused:
            session(content, 1)
        assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="threads must be at least 1, but got 0"):
        session(b"", 0)
