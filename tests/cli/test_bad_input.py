"""Bad input: one clear line, exit 2, nothing on stdout, nothing written."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import torch
from command_line import Ended, contents

from dsm_tune import demo
from dsm_tune.searching.study import Study

Call = Callable[..., Ended]
BUDGET = ("--budget-gflops", "60%")


def refused(call: Call, *arguments: str) -> str:
    before = contents(Path.cwd())
    error = call(*arguments).error
    assert contents(Path.cwd()) == before
    return error


# -- the command line itself ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "a budget must be given"),
        (["--trials", "3"], "a budget must be given"),
        (["--budgt-ms", "5"], "there is no option --budgt-ms; did you mean '--budget-ms'"),
        (["--budget-ms"], "--budget-ms requires an argument"),
        ([*BUDGET, "--trials", "many"], "--trials must be an integer, but got 'many'"),
        ([*BUDGET, "--trials", "2.5"], "--trials must be an integer, but got '2.5'"),
        ([*BUDGET, "--trials", "0"], "--trials must be an integer >= 1, but got 0"),
        ([*BUDGET, "--timeout", "nan"], "--timeout must be a number, but got 'nan'"),
        ([*BUDGET, "--timeout", "-1"], "--timeout must be a number >= 0, but got -1.0"),
        ([*BUDGET, "--latency-stat", "p42"], "--latency-stat must be one of p50, p90, p99"),
        ([*BUDGET, "--dtype", "int8"], "--dtype must be one of float32, float16, bfloat16"),
        ([*BUDGET, "--runtime", "fast"], "--runtime must be one of eager, onnx, cudagraphs"),
        ([*BUDGET, "--device", "cpu", "--runtime", "cudagraphs"], "accepted are eager, onnx"),
        (
            [*BUDGET, "--dtype", "float16", "--runtime", "onnx"],
            "float32 on the CPU, but got float16",
        ),
        ([*BUDGET, "--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, but got 'tpu'"),
        ([*BUDGET, "--device", "cuda:99"], "--device must be present, but got cuda:99"),
        ([*BUDGET, "--study", "a/b"], "--study must be 1 to 200 letters"),
        ([*BUDGET, "--json=1"], "--json does not take a value"),
        ([*BUDGET, "--img-size", "64"], "the embedded demo model takes no --checkpoint"),
        ([*BUDGET, "--model-kwargs", "{"], "--model-kwargs must be a JSON object or key=value"),
        ([*BUDGET, "--model-kwargs", "7"], "--model-kwargs must be a JSON object or key=value"),
        ([*BUDGET, "show", "x"], "a verb stands first"),
        (["shwo", "x"], "'shwo' is no verb; did you mean 'show'?"),
        (["show"], "STUDY must be given"),
        (["resume"], "STUDY must be given"),
        (["profile"], "--output must be given"),
        (["curve", "--plot", "curve.gif"], "--plot must end in .png or .svg, but got 'curve.gif'"),
        (["curve", "--plot", "no/such/curve.png"], "--plot must be a file that can be written"),
        (["profile", "-o", "/proc"], "--output must be a file that can be written, but /proc"),
        (["ui"], "there is no MLflow store at"),
        ([*BUDGET, "--ray-address", "127.0.0.1:1"], "--ray-address must be a Ray cluster that"),
        ([*BUDGET, "--ray-address", "http://a:8265"], "a dashboard; `dsm-tune submit` takes those"),
        ([*BUDGET, "--tracking-uri", "runs"], "the MLflow tracking URI must not be a folder"),
        ([*BUDGET, "--device-profile", "no.json"], "--device-profile must be a readable file"),
        ([*BUDGET, "--config", "no.toml"], "--config must be a readable file, but no.toml"),
        ([*BUDGET, "--search-space", "defualt"], "did you mean 'default'?"),
        ([*BUDGET, "--device", "cuda:" + "9" * 5000], "--device must be auto, cpu, cuda or"),
        (["show", "x", "--storage", f"sqlite:///{'a' * 300}"], "there is no study store at"),
    ],
)
def test_usage_errors_are_one_line(call: Call, arguments: list[str], expected: str) -> None:
    assert expected in refused(call, *arguments)


@pytest.mark.parametrize("option", ["--budget-ms", "--budget-gflops", "--budget-gmacs"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "five", "", "0%", "-3%", "5ms"])
def test_a_budget_is_a_number_above_zero_or_a_percentage(
    call: Call, option: str, value: str
) -> None:
    error = refused(call, option, value)
    assert "must be a number > 0 or a percentage of dense" in error
    assert repr(value) in error


# -- the file of --config -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trails = 3", "tune.toml: 'trails' is not an option; did you mean 'trials'"),
        ("budget = 3", "tune.toml: 'budget' is not an option; did you mean 'budget_ms'"),
        ("trials = 'x'", "tune.toml: trials must be an integer, but got 'x'"),
        ("trials = true", "tune.toml: trials must be an integer, but got True"),
        ("trials = 0", "tune.toml: --trials must be an integer >= 1, but got 0"),
        ("seed = -1", "tune.toml: --seed must be an integer >= 0, but got -1"),
        ("model = 3", "tune.toml: model must be a string, but got 3"),
        ("json = 1", "tune.toml: json must be true or false, but got 1"),
        ("budget-ms = 0", "tune.toml: budget-ms: --budget-ms must be a number > 0"),
        ("seed = 1\nse-ed = 2", "tune.toml: 'se-ed' is not an option; did you mean 'seed'?"),
        ("img_size = 1\nimg-size = 2", "tune.toml: img-size is given twice"),
        ("config = 'x'", "tune.toml: 'config' is not an option"),
        ("[tune]\ntrials = 3", "tune.toml: 'tune' is not an option"),
        ("trials = ", "tune.toml: --config must be TOML in UTF-8"),
        ("trials = " + "[" * 5000 + "]" * 5000, "tune.toml: --config must be TOML in UTF-8"),
        ("seed = 0x" + "f" * 5000, "seed must be an integer, but got a int too large to print"),
        ("max_drop = " + "9" * 400, "tune.toml: max_drop must be a number, but got 9999"),
    ],
)
def test_a_configuration_file_is_checked_by_file_and_key(
    call: Call, text: str, expected: str
) -> None:
    Path("tune.toml").write_text(text)
    assert expected in refused(call, *BUDGET, "--config", "tune.toml")


# -- models and checkpoints -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("deit_tinny_patch16_224", "'deit_tiny_patch16_224'"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer"),
        ("resnet18", "ResNet"),
    ],
)
def test_a_model_must_be_a_vision_transformer_of_timm(
    call: Call, photographs: Path, model: str, expected: str
) -> None:
    assert expected in refused(call, "--model", model, "--images", str(photographs), *BUDGET)


def test_a_model_needs_images(call: Call) -> None:
    assert "--images must name a folder" in refused(
        call, "--model", "deit_tiny_patch16_224", *BUDGET
    )


def test_a_checkpoint_must_fit(call: Call, photographs: Path) -> None:
    weights = Path(demo.__file__).parent / "digits_vit.safetensors"
    error = refused(
        call,
        *("--model", "deit_tiny_patch16_224", "--images", str(photographs), *BUDGET),
        *("--checkpoint", str(weights)),
    )
    assert "digits_vit.safetensors does not fit the model: " in error
    assert "must have the shape" in error


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "weights.bin"])
@pytest.mark.parametrize("with_torch", [True, False])
def test_code_in_a_checkpoint_is_refused_and_never_run(
    call: Call, photographs: Path, name: str, with_torch: bool
) -> None:
    if with_torch:
        torch.save({"head.weight": Bomb()}, name)
    else:
        Path(name).write_bytes(pickle.dumps({"head.weight": Bomb()}))
    error = refused(
        call,
        *("--model", "deit_tiny_patch16_224", "--images", str(photographs), *BUDGET),
        *("--checkpoint", name),
    )
    assert f"{name}: a checkpoint must hold tensors only, but this one would run code" in error
    assert not Path("exploded").exists()


# -- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], "it is empty"),
        (["notes.txt", "more.md"], "none of its 2 files is one"),
        (["fake.jpg"], "must hold at least 4 readable images"),
    ],
)
def test_a_folder_of_images_must_hold_some(call: Call, files: list[str], expected: str) -> None:
    Path("images").mkdir()
    for name in files:
        Path("images", name).write_text("no image")
    error = refused(call, "--images", "images", *BUDGET)
    assert expected in error
    assert "accepted are .jpg, .jpeg, .png, .webp, .bmp" in error


def test_a_truncated_image_among_good_ones_is_skipped_and_named(
    call: Call, photographs: Path
) -> None:
    good = (photographs / "0.jpg").read_bytes()
    (photographs / "torn.jpg").write_bytes(good[: len(good) // 2])
    ended = call("curve", "--images", str(photographs), "--json")
    assert ended.code == 0
    assert "skipped torn.jpg: " in ended.err
    assert ended.json["images"] == 3  # half of the six are held out


# -- search spaces --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("format = 'dsm_tune.space/1'\n[delays]\noffset = 0", "'delays' is not a key"),
        ("format = 'dsm_tune.space/9'", "format must be 'dsm_tune.space/1'"),
        ("format = ", "a search space must be TOML"),
    ],
)
def test_a_broken_search_space_is_named_by_file_and_key(
    call: Call, text: str, expected: str
) -> None:
    Path("mine.toml").write_text(text)
    error = refused(call, *BUDGET, "--search-space", "mine.toml")
    assert "mine.toml" in error
    assert expected in error


# -- stores and studies ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///.",
        "sqlite:///plain.txt/study.db",
        "sqlite:////proc/study.db",
        "sqlite:///plain.txt",
        "sqlite:///no/such/folder/study.db",
        "not a url",
        "oracle+nothing://host/db",
    ],
)
def test_a_store_must_be_writable(call: Call, url: str) -> None:
    Path("plain.txt").write_text(
        "not a database, and longer than its header of a hundred bytes" * 3
    )
    assert "--storage must be" in refused(call, *BUDGET, "--storage", url)


@pytest.mark.parametrize("verb", ["show", "resume", "sync"])
def test_an_unknown_study_makes_no_store(call: Call, verb: str) -> None:
    assert "there is no study store at" in refused(call, verb, "x")


@pytest.mark.parametrize("verb", ["show", "resume", "sync"])
def test_an_unknown_study_is_told_its_neighbours(call: Call, verb: str) -> None:
    Study.create("sqlite:///dsm_tune.db", "digits-1", {})
    assert "there is no study 'digit-1' in this store; did you mean 'digits-1'?" in refused(
        call, verb, "digit-1"
    )


@pytest.mark.parametrize(
    "arguments", [["show", "theirs"], ["resume", "theirs"], [*BUDGET, "--study", "theirs"]]
)
def test_a_study_of_another_program_is_left_alone(call: Call, arguments: list[str]) -> None:
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    optuna.create_study(storage="sqlite:///dsm_tune.db", study_name="theirs")
    optuna.logging.set_verbosity(level)
    assert "another program made it" in refused(call, *arguments)


def test_a_database_of_something_else_is_not_written_to(call: Call) -> None:
    Path("other.db").touch()
    assert "other.db" in refused(call, "show", "x", "--storage", "sqlite:///other.db")


def test_a_study_that_exists_with_another_model_is_refused(call: Call) -> None:
    facts = {"config": {}, "identity": {"model": "deit_small_patch16_224"}, "study_id": "0"}
    Study.create("sqlite:///dsm_tune.db", "taken", facts)
    error = refused(call, *BUDGET, "--study", "taken")
    assert (
        "the study 'taken' exists with another model: 'deit_small_patch16_224', not "
        "'dsm_tune_demo'; accepted are the same configuration or another --study" in error
    )


def test_a_study_that_has_not_begun_says_so(call: Call) -> None:
    Study.create("sqlite:///dsm_tune.db", "young", {"config": {}})
    for verb in ("show", "sync"):
        assert "has not begun its search yet" in refused(call, verb, "young")
