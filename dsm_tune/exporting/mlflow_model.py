"""A model under a plan as a model of MLflow's, which ``mlflow models serve`` runs."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from dsm_tune.errors import ConfigError
from dsm_tune.exporting.formats import FILES, write_format
from dsm_tune.plan import MergePlan
from dsm_tune.runtimes.onnx.files import need_packages

__all__ = ["save"]


def save(model: nn.Module, plan: MergePlan, folder: Path, example: Tensor) -> None:
    """Write an MLflow model of the ONNX flavour: ``pixels`` in, ``logits`` out, any batch.

    Args:
        model: dense, float32, in evaluation mode, on the CPU.
        plan: made for its geometry.
        folder: empty; it becomes the model.
        example: pixels [B >= 2, 3, H, W] that are stored as the input example.

    Raises:
        ConfigError: if a package is not installed.
        ModelError: if the model cannot be exported.
    """
    need_packages("exporting to MLflow")
    try:
        import mlflow.onnx
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec
    except ImportError as error:
        raise ConfigError(f"exporting to MLflow needs the package {error.name}") from None
    import onnx

    write_format("onnx", model, plan, folder)
    file = folder / FILES["onnx"]
    content = onnx.load(file)
    file.unlink()
    sides = [side * plan.geometry.patch for side in plan.geometry.grid]
    kind = np.dtype(np.float32)
    classes = plan.geometry.classes or plan.geometry.width
    signature = ModelSignature(
        inputs=Schema([TensorSpec(kind, (-1, 3, *sides), "pixels")]),
        outputs=Schema([TensorSpec(kind, (-1, classes), "logits")]),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about ways of MLflow's own
        mlflow.onnx.save_model(
            content,
            str(folder),
            signature=signature,
            input_example={"pixels": example.numpy()},
            save_as_external_data=False,
            metadata={"dsm_tune.plan": plan.to_json()},
        )
