"""The embedded default: its splits, its weights and the training that made them."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import safetensors.torch
import timm.data
import torch
from sklearn.datasets import load_digits

from dsm_tune import demo
from dsm_tune.demo import digits, train
from dsm_tune.demo import model as demo_model
from dsm_tune.errors import ConfigError, ModelError


@pytest.fixture(scope="module")
def holdout() -> tuple[torch.Tensor, torch.Tensor]:
    return demo.load_split("holdout")


def test_splits_are_disjoint_and_cover_all_1797_images() -> None:
    labels = torch.from_numpy(load_digits().target)
    indices = [digits.split_indices(labels, name) for name in digits.SPLITS]
    assert [len(part) for part in indices] == [1000, 399, 398]
    assert torch.cat(indices).sort().values.equal(torch.arange(1797))


def test_no_image_stands_in_two_splits() -> None:
    seen = [{image.numpy().tobytes() for image in demo.load_split(n)[0]} for n in digits.SPLITS]
    assert sum(map(len, seen)) == len(set.union(*seen))


@pytest.mark.parametrize("name", digits.SPLITS)
def test_splits_are_stratified_to_within_one_image_per_class(name: str) -> None:
    labels = torch.from_numpy(load_digits().target)
    part = labels[digits.split_indices(labels, name)]
    share = labels.bincount() * len(part) / len(labels)
    assert (part.bincount() - share).abs().max() <= 1


def test_images_have_the_promised_shape_dtype_and_scale(
    holdout: tuple[torch.Tensor, torch.Tensor],
) -> None:
    images, labels = holdout
    assert images.shape == (398, 3, 28, 28)
    assert images.dtype == torch.float32
    assert labels.shape == (398,)
    assert labels.dtype == torch.int64
    assert images.mean().abs() < 0.05
    assert 0.9 < images.std() < 1.1
    assert images.equal(demo.load_split("holdout")[0])


def test_unknown_split_names_the_accepted_ones() -> None:
    with pytest.raises(ConfigError, match="split must be one of train, search, holdout, but got"):
        demo.load_split("test")  # type: ignore[arg-type]


def test_packaged_weights_fit_strictly_and_are_under_four_megabytes() -> None:
    packed = resources.files(demo).joinpath(demo_model.WEIGHTS).read_bytes()
    assert len(packed) < 4_000_000
    fresh = demo_model.untrained_model()
    result = fresh.load_state_dict(safetensors.torch.load(packed), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    model = demo.create_model()
    assert not model.training
    for name, value in fresh.state_dict().items():
        assert model.state_dict()[name].equal(value), name


def test_missing_weights_are_a_model_error_that_says_how_to_write_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo_model, "WEIGHTS", "absent.safetensors")
    with pytest.raises(ModelError, match=r"python -m dsm_tune\.demo\.train"):
        demo.create_model()


def test_timm_finds_the_models_own_transform() -> None:
    config = timm.data.resolve_model_data_config(demo.create_model())
    assert config["input_size"] == (3, 28, 28)
    assert (config["mean"], config["std"]) == (demo.MEAN, demo.STD)
    assert config["crop_pct"] == 1.0


def test_held_out_top1_is_at_least_97_percent(holdout: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert train.accuracy(demo.create_model(), *holdout) >= 0.97


def test_importing_the_room_imports_no_torch() -> None:
    code = "import sys, dsm_tune.demo; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_augmentation_keeps_the_shape_and_depends_on_its_generator_alone(
    holdout: tuple[torch.Tensor, torch.Tensor],
) -> None:
    images = holdout[0][:8]
    first, again = (digits.augment(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.shape == images.shape
    assert first.equal(again)
    assert not first.equal(digits.augment(images, torch.Generator().manual_seed(4)))


def test_training_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    images, labels = (part[:60] for part in demo.load_split("train"))
    before = torch.random.get_rng_state()
    first, again = (train.train(images, labels, epochs=2, seed=5).state_dict() for _ in range(2))
    assert torch.random.get_rng_state().equal(before)
    assert all(first[name].equal(again[name]) for name in first)


def test_learning_rate_warms_up_to_its_peak_and_ends_at_zero() -> None:
    assert 0 < train.learning_rate(0.0) < train.learning_rate(train.WARM_UP / 2)
    assert train.learning_rate(train.WARM_UP) == train.PEAK_RATE
    assert train.learning_rate(1.0) == pytest.approx(0.0)


def test_a_failed_save_keeps_the_old_weights_and_leaves_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"old")

    def fail(source: str, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(train.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        train.save(demo_model.untrained_model(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_the_training_command_writes_the_same_file_twice(tmp_path: Path) -> None:
    files = [tmp_path / "first.safetensors", tmp_path / "again.safetensors"]
    for file in files:
        command = [sys.executable, "-m", "dsm_tune.demo.train", "--epochs", "1"]
        subprocess.run([*command, "--output", str(file)], check=True, capture_output=True)
    assert files[0].read_bytes() == files[1].read_bytes()
