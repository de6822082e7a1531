"""The embedded default: a small trained ViT and the real images that it knows.

The images are scikit-learn's handwritten digits (1797 of them, 8 x 8, up-sampled to 28 x 28);
the model is timm's ``VisionTransformer`` with 14 x 14 patch tokens and a class token.
``python -m dsm_tune.demo.train`` reproduces the weights.

Held-out top-1: 100.0 % (398 of 398 images); search split 99.5 % (397 of 399).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

__all__ = ["CLASS_NAMES", "MEAN", "MODEL_NAME", "STD", "create_model", "load_split"]

MODEL_NAME = "dsm_tune_demo"
CLASS_NAMES = tuple("0123456789")
MEAN = (0.31, 0.31, 0.31)
STD = (0.34, 0.34, 0.34)


def create_model() -> torch.nn.Module:
    """Return the trained model in eval mode, on the CPU, in float32.

    It takes images ``[B, 3, 28, 28]`` as :func:`load_split` gives them and returns logits
    ``[B, 10]``, in the order of ``CLASS_NAMES``.

    Raises:
        ModelError: if the packaged weights are missing or do not fit.
    """
    from dsm_tune.demo import model

    trained: torch.nn.Module = model.create_model()
    return trained


def load_split(name: Literal["train", "search", "holdout"]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images and labels of one split, the same ones on every call.

    Args:
        name: ``train`` (1000 images, which the weights have seen), ``search`` (399) or
            ``holdout`` (398). The splits are disjoint and stratified.

    Returns:
        Images ``[N, 3, 28, 28]``, float32, normalised with ``MEAN`` and ``STD``, and labels
        ``[N]``, int64, from 0 to 9.

    Raises:
        ConfigError: for any other name.
    """
    from dsm_tune.demo import digits

    return digits.load_split(name)
