"""A model under a plan as a model of MLflow's: a folder to serve, or a registered version."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dsm_tune.errors import ConfigError, DsmTuneError, StudyError, first_line
from dsm_tune.exporting.folders import holds_only
from dsm_tune.plan import MergePlan
from dsm_tune.runtimes.onnx.files import PLAN_KEY, need_packages

__all__ = ["CHAMPION", "PREVIOUS", "check_name", "is_model", "register", "save"]

CHAMPION, PREVIOUS = "champion", "previous"
# Files of a model folder of MLflow's.
WRITTEN = {
    *("MLmodel", "model.onnx", "conda.yaml", "python_env.yaml", "requirements.txt"),
    *("input_example.json", "serving_input_example.json"),
}


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model that :func:`save` wrote, and nothing else."""
    if not holds_only(folder, "MLmodel", WRITTEN):
        return False
    return PLAN_KEY in (folder / "MLmodel").read_text(errors="replace")


def save(onnx_file: Path, plan: MergePlan, folder: Path, example: Tensor) -> None:
    """Write an MLflow model of the ONNX flavour: ``pixels`` in, ``logits`` out, any batch.

    Args:
        onnx_file: the merged model, as :func:`dsm_tune.exporting.formats.write_format` has it.
        plan: of it.
        folder: empty; it becomes the model.
        example: pixels [B >= 2, 3, H, W] that are stored as the input example.

    Raises:
        ConfigError: if a package is not installed.
    """
    with _mlflow() as mlflow:
        mlflow.onnx.save_model(path=str(folder), **_contents(onnx_file, plan, example))


def register(
    onnx_file: Path,
    plan: MergePlan,
    example: Tensor,
    *,
    name: str,
    tracking_uri: str,
    run_id: str | None = None,
) -> str:
    """Log the model and make it the champion of a registered model.

    The version that was the champion keeps the alias ``previous``.

    Args:
        onnx_file, plan, example: as for :func:`save`.
        name: of the registered model; it is made if there is none.
        tracking_uri: of MLflow.
        run_id: run that the model belongs to, if there is one.

    Returns:
        The version.

    Raises:
        ConfigError: if a package is not installed.
        StudyError: if MLflow does not take it.
    """
    with _mlflow() as mlflow:
        before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(tracking_uri)
        try:
            client = mlflow.MlflowClient(tracking_uri)
            logged = mlflow.models.Model.log(
                artifact_path=None,
                name="model",
                flavor=mlflow.onnx,
                run_id=run_id,
                registered_model_name=name,
                **_contents(onnx_file, plan, example),
            )
            version = str(logged.registered_model_version)
            former = dict(client.get_registered_model(name).aliases).get(CHAMPION)
            if former is not None and str(former) != version:
                client.set_registered_model_alias(name, PREVIOUS, str(former))
            client.set_registered_model_alias(name, CHAMPION, version)
        except DsmTuneError:
            raise
        except Exception as error:  # MLflow, its database and its server raise many kinds
            raise StudyError(f"MLflow must take the model, but said: {first_line(error)}") from None
        finally:
            mlflow.set_tracking_uri(before)
    return version


def check_name(name: str) -> None:
    """Refuse a name that no registered model can have."""
    if not name.strip() or any(sign in name for sign in "/:") or not name.isprintable():
        raise ConfigError(f"--register must be a name without / and :, but got {name!r:.60}")


def _contents(onnx_file: Path, plan: MergePlan, example: Tensor) -> Mapping[str, Any]:
    """What both ways of storing take."""
    import onnx
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    kind = np.dtype(np.float32)
    classes = plan.geometry.classes or plan.geometry.width
    signature = ModelSignature(
        inputs=Schema([TensorSpec(kind, (-1, *example.shape[1:]), "pixels")]),
        outputs=Schema([TensorSpec(kind, (-1, classes), "logits")]),
    )
    return {
        "onnx_model": onnx.load(onnx_file),
        "signature": signature,
        "input_example": {"pixels": example.numpy()},
        "save_as_external_data": False,
        "metadata": {PLAN_KEY: plan.to_json()},
    }


@contextmanager
def _mlflow() -> Iterator[Any]:
    """MLflow, without what it tells of its own ways."""
    need_packages("exporting to MLflow")
    try:
        import mlflow
        import mlflow.onnx
    except ImportError as error:
        raise ConfigError(
            f"exporting to MLflow needs the package {error.name}, which is not installed here"
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield mlflow
