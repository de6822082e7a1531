"""Shared by all tests: one torch thread, calm Hypothesis settings, a real model, photographs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image
from torch import Tensor, nn

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

torch.set_num_threads(1)  # the same bits on every machine, and no quarrel over cores
settings.register_profile(
    "dsm_tune",
    deadline=None,  # a first forward is slow
    max_examples=30,
    derandomize=True,  # a red run is red again; look further with --hypothesis-profile=explore
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "explore",
    settings.get_profile("dsm_tune"),
    derandomize=False,
    max_examples=200,
    print_blob=True,
)
settings.load_profile("dsm_tune")


@pytest.fixture(scope="session")
def deit_tiny() -> nn.Module:
    """The real DeiT-Ti/16 in eval mode."""
    weights = SHARED_DATA / "deit_tiny_patch16_224.safetensors"
    if not weights.is_file():
        pytest.skip(f"needs the shared DeiT-Ti weights, and there is no {weights}")
    import timm
    from safetensors.torch import load_file

    model: nn.Module = timm.create_model("deit_tiny_patch16_224").eval()
    model.load_state_dict(load_file(weights))
    return model


@pytest.fixture(scope="session")
def photos(deit_tiny: nn.Module) -> Tensor:
    """The first 64 photographs of labels.csv, as DeiT-Ti wants them: [64, 3, 224, 224]."""
    listing = SHARED_DATA / "photos" / "labels.csv"
    if not listing.is_file():
        pytest.skip(f"needs the shared photographs, and there is no {listing}")
    from timm.data import create_transform, resolve_model_data_config

    transform = create_transform(**resolve_model_data_config(deit_tiny))
    with listing.open(newline="") as rows:
        names = [row["file"] for row in csv.DictReader(rows)][:64]
    opened = [Image.open(listing.parent / name).convert("RGB") for name in names]
    return torch.stack([transform(image) for image in opened])
