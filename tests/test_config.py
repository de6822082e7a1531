"""What a tune is asked: checked, made absolute, known again and repeated."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dsm_tune.config import DEMO_MODEL, FREE, TuneConfig, absolute_storage
from dsm_tune.errors import BudgetError, ConfigError, DsmTuneError


def config(**changes: Any) -> TuneConfig:
    return TuneConfig(**{"budget_ms": "60%", **changes})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 0}, "--batch-size must be an integer >= 1, but got 0"),
        ({"batch_size": True}, "--batch-size must be an integer >= 1, but got True"),
        ({"trials": 1.5}, "--trials must be an integer >= 1, but got 1.5"),
        ({"trials": "60"}, "--trials must be an integer >= 1, but got '60'"),
        ({"seed": -1}, "--seed must be an integer >= 0, but got -1"),
        ({"seed": 1 << 32}, "--seed must be an integer >= 0"),
        ({"img_size": 0}, "--img-size must be an integer >= 1"),
        ({"threads": 0}, "--threads must be an integer >= 1"),
        ({"workers": 0}, "--workers must be an integer >= 1"),
        ({"latency_stat": "p95"}, "--latency-stat must be one of p50, p90, p99, but got 'p95'"),
        ({"dtype": "int8"}, "--dtype must be one of float32, float16, bfloat16"),
        ({"device": "tpu"}, "--device must be auto, cpu, cuda or cuda:N, but got 'tpu'"),
        ({"device": "cuda:"}, "--device must be auto, cpu, cuda or cuda:N"),
        ({"max_drop": -1}, "--max-drop must be a number >= 0, but got -1"),
        ({"max_drop": float("nan")}, "--max-drop must be a number >= 0, but got nan"),
        ({"timeout": float("inf")}, "--timeout must be a number >= 0, but got inf"),
        ({"timeout": "60"}, "--timeout must be a number >= 0, but got '60'"),
        ({"model": "deit_tiny_patch16_224"}, "--images must name a folder of calibration images"),
        ({"study": ""}, "--study must be 1 to 200 letters"),
        ({"study": "a/b"}, "--study must be 1 to 200 letters"),
        ({"study": "x" * 201}, "--study must be 1 to 200 letters"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_option(
    change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**change)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_a_budget_must_be_given() -> None:
    with pytest.raises(BudgetError, match=r"--budget-ms .* or --budget-gflops"):
        TuneConfig()


def test_a_module_needs_images_too() -> None:
    with pytest.raises(ConfigError, match="--images must name"):
        config(model=nn.Linear(1, 1))


def test_an_unknown_option_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"x\.toml: 'trails' is not an option; did you mean"):
        TuneConfig.from_dict({"trails": 1}, "x.toml: ")
    assert TuneConfig.from_dict({"budget_ms": 5.0, "trials": 9}) == TuneConfig(
        budget_ms=5.0, trials=9
    )


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_the_devices_of_torch_are_accepted(device: str) -> None:
    assert config(device=device).device == device


# -- absolute ---------------------------------------------------------------------------------


def test_paths_and_the_storage_are_made_absolute_once(tmp_path: Path) -> None:
    given = config(images="photos", checkpoint="w.safetensors", device_profile="../gpu.json",
                   search_space="mine.toml")  # fmt: skip
    found = given.absolute(tmp_path, {})
    assert found.images == str(tmp_path / "photos")
    assert found.checkpoint == str(tmp_path / "w.safetensors")
    assert found.device_profile == str(tmp_path.parent / "gpu.json")
    assert found.search_space == str(tmp_path / "mine.toml")
    assert found.storage == f"sqlite:///{tmp_path}/dsm_tune.db"
    assert found.absolute(tmp_path / "elsewhere", {}) == found


def test_what_is_no_path_stays_as_it_is(tmp_path: Path) -> None:
    found = config().absolute(tmp_path, {})
    assert (found.images, found.checkpoint, found.device_profile) == (None, None, None)
    assert found.search_space == "default"
    assert found.ray_address is None


@pytest.mark.parametrize(
    ("url", "environ", "found"),
    [
        (None, {}, "sqlite:////here/dsm_tune.db"),
        (None, {"OPTUNA_STORAGE": "sqlite:///a.db"}, "sqlite:////here/a.db"),
        ("sqlite:///b.db", {"OPTUNA_STORAGE": "sqlite:///a.db"}, "sqlite:////here/b.db"),
        ("sqlite:////there/c.db", {}, "sqlite:////there/c.db"),
        ("postgresql://h/d", {}, "postgresql://h/d"),
    ],
)
def test_the_storage_is_given_or_of_the_environment_or_here(
    url: str | None, environ: dict[str, str], found: str
) -> None:
    assert absolute_storage(url, Path("/here"), environ) == found


def test_the_ray_address_of_the_environment_is_respected(tmp_path: Path) -> None:
    environ = {"RAY_ADDRESS": "10.0.0.1:6379"}
    assert config().absolute(tmp_path, environ).ray_address == "10.0.0.1:6379"
    given = config(ray_address="10.0.0.2:6379")
    assert given.absolute(tmp_path, environ).ray_address == "10.0.0.2:6379"


# -- identity ---------------------------------------------------------------------------------


def test_the_name_of_a_study_says_model_and_budget_and_never_changes() -> None:
    assert config().study_name == config().study_name
    assert config().study_name.startswith(f"{DEMO_MODEL}-60%ms-")
    both = config(budget_ms=5.0, budget_gflops="2.7")
    assert both.study_name.startswith(f"{DEMO_MODEL}-5.0ms-2.7gmacs-")
    assert config(study="mine").study_name == "mine"


@pytest.mark.parametrize(
    "change",
    [{"trials": 7}, {"timeout": 9.0}, {"workers": 1}, {"storage": "sqlite:////x.db"},
     {"tracking_uri": "sqlite:////y.db"}, {"experiment": "e"}, {"ray_address": "a:1"}],
)  # fmt: skip
def test_what_changes_no_trial_does_not_change_the_study(change: dict[str, Any]) -> None:
    assert set(change) <= set(FREE)
    assert config(**change).study_name == config().study_name
    assert config(**change).identity() == config().identity()


@pytest.mark.parametrize(
    "change",
    [{"budget_ms": "61%"}, {"seed": 1}, {"batch_size": 8}, {"dtype": "float16"}, {"threads": 1},
     {"search_space": "wide"}, {"images": "/photos"}, {"max_drop": 1.0}, {"latency_stat": "p90"},
     {"budget_gflops": 1.0}, {"device": "cpu"}, {"device_profile": "/gpu.json"}],
)  # fmt: skip
def test_what_may_change_a_trial_changes_the_study(change: dict[str, Any]) -> None:
    assert config(**change).study_name != config().study_name


def test_every_name_a_study_can_get_is_a_name_it_can_be_given() -> None:
    hub = config(model="hf-hub:timm/vit tiny/16", images="/photos", budget_gflops=" 60 %")
    assert config(study=hub.study_name).study_name == hub.study_name
    assert len(config(model="m" * 300, images="/photos").study_name) <= 200


def test_a_configuration_can_be_stored_and_read_back() -> None:
    one = config(model_kwargs={"num_classes": 10}, trials=9, images="/photos")
    assert TuneConfig.from_dict(json.loads(json.dumps(one.to_dict()))) == one


# -- the command ------------------------------------------------------------------------------


def read(command: str) -> TuneConfig:
    """Read a command line back by the names and types of the fields alone."""
    words = shlex.split(command)
    assert words.pop(0) == "dsm-tune"
    values: dict[str, Any] = {}
    fields = {f.name: str(f.type) for f in dataclasses.fields(TuneConfig)}
    while words:
        name = words.pop(0).removeprefix("--").replace("-", "_")
        if fields[name] == "bool":
            values[name] = True
            continue
        text = words.pop(0)
        values[name] = text if "str" in fields[name].split(" | ")[:2] else json.loads(text)
    return TuneConfig(**values)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"trials": 7, "seed": 3, "workers": 1},
        {"max_drop": 0.0, "timeout": 0.0},
        {"budget_ms": None, "budget_gflops": "2.7"},
        {"model": "vit_tiny", "images": "/my photos/it's", "pretrained": True},
        {"model": "vit_tiny", "images": "/p", "model_kwargs": {"num_classes": 10, "a": "b c"}},
        {"study": "a b", "search_space": "/x y.toml", "dtype": "bfloat16", "device": "cuda:1"},
    ],
)
def test_the_command_repeats_the_configuration(change: dict[str, Any]) -> None:
    one = config(**change)
    assert read(one.command) == one


def test_the_command_names_neither_stores_nor_passwords() -> None:
    one = config(storage="postgresql://me:secret@h/d", tracking_uri="http://me:secret@h")
    assert one.command == "dsm-tune --budget-ms 60%"


def test_the_command_of_a_module_names_its_class() -> None:
    one = config(model=nn.Linear(1, 1), images="/photos")
    assert shlex.split(one.command)[:3] == ["dsm-tune", "--model", "Linear"]


def test_every_refusal_is_an_error_of_ours() -> None:
    with pytest.raises(DsmTuneError):
        config(trials=0)


def test_the_file_of_a_configuration_repeats_it(tmp_path: Path) -> None:
    from dsm_tune.cli.group import verbs
    from dsm_tune.cli.options import gather
    from dsm_tune.cli.studies import tune

    one = TuneConfig(
        model="deit_tiny_patch16_224",
        model_kwargs={"qk_norm": True},
        images='/a "folder"',
        budget_ms=5.5,
        budget_gflops="60%",
        trials=9,
        timeout=30.0,
        storage="sqlite:////private.db",
    )
    assert "private" not in one.toml
    file = tmp_path / "config.toml"
    file.write_text(one.toml)
    assert tune is verbs.commands["tune"]
    again = gather(tune, {"config": str(file)}, {}).config()
    for name, value in one.identity().items():
        assert str(again.identity()[name]) == str(value), name
