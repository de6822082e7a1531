"""Attention received and norms are those of the model's own forward."""

from __future__ import annotations

import pytest
import torch
from small_vits import KINDS, images_for, small_vit

from dsm_tune.errors import ImagesError
from dsm_tune.merging.sinks import attention_sinks


@pytest.mark.parametrize("kind", KINDS)
def test_attention_received_averages_one_and_norms_are_those_of_the_blocks(kind: str) -> None:
    model = small_vit(kind)
    images = images_for(model)
    outputs = []
    hooks = [b.register_forward_hook(lambda *a: outputs.append(a[2])) for b in model.blocks]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    found = attention_sinks(model, images)
    assert found.received.shape == found.norms.shape == (2, 4, outputs[0].shape[1])
    torch.testing.assert_close(found.received.mean(dim=2), torch.ones(2, 4))
    torch.testing.assert_close(found.norms, torch.stack(outputs, dim=1).norm(dim=-1))


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ImagesError, match=r"^images must have the shape \[B, 3, H, W\]"):
        attention_sinks(small_vit(), torch.zeros(3, 8, 8))
