"""Makes a model from its timm name and a checkpoint; no pickled code is ever run."""

from __future__ import annotations

import hashlib
import logging
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from dsm_tune.errors import ModelError, first_line, nearest

__all__ = ["create_model", "load_weights", "weights_digest"]

HEAD_WEIGHTS = ("head.weight", "head_dist.weight")


def create_model(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    img_size: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Make a model in evaluation mode.

    Args:
        name: a timm name, with or without its weights' tag; ``hf-hub:`` names too.
        checkpoint: ``.safetensors``, or ``.pth``/``.pt`` read with ``weights_only=True``; its head
            sets the number of classes.
        pretrained: download timm's own weights.
        img_size: side of the input in pixels, if not the model's own.
        model_kwargs: passed to ``timm.create_model``.

    Raises:
        ModelError: if the name is unknown, or the weights are unreadable or do not fit.
    """
    if not name.startswith("hf-hub:") and not timm.is_model(name.split(".")[0]):
        known = timm.list_models("*vit*") + timm.list_models("*deit*")
        raise ModelError(
            f"--model must be a timm model, but got {name!r:.80}{nearest(name[:80], known)}"
        )
    kwargs: dict[str, Any] = dict(model_kwargs or {})
    if img_size is not None:
        kwargs["img_size"] = img_size
    weights = None if checkpoint is None else load_weights(checkpoint)
    if weights is not None:
        classes = next((len(weights[key]) for key in HEAD_WEIGHTS if key in weights), None)
        if classes is not None:
            kwargs.setdefault("num_classes", classes)
    model = _make(name, pretrained, kwargs)
    if weights is not None:
        _fit_weights(model, weights, f"{checkpoint}")
    return model.eval()


def _make(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm's and hub's notices are not about this run
            model: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:  # timm raises many kinds: TypeError, RuntimeError, hub and OS errors
        raise ModelError(
            f"the model {name} cannot be made with these options: {first_line(error)}"
        ) from None
    return model


def load_weights(file: str | Path) -> dict[str, Tensor]:
    """Read a state dict.

    Args:
        file: ``.safetensors``, or a ``torch.save`` file of tensors and plain containers.

    Raises:
        ModelError: if it cannot be read, or holds anything that would have to be executed.
    """
    path = Path(file)
    if not path.is_file():
        raise ModelError(f"--checkpoint must be a file, but got {str(file)!r:.200}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            f"{path}: a checkpoint must hold tensors only, but this one would run code; "
            "accepted are .safetensors and state dicts"
        ) from None
    except Exception as error:  # torch raises anything on a damaged file: IndexError, KeyError …
        raise ModelError(f"{path}: cannot be read as a checkpoint: {first_line(error)}") from None
    return _state_dict(loaded, path)


def _state_dict(loaded: Any, path: Path) -> dict[str, Tensor]:
    for key in ("model_ema", "state_dict_ema", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    tensors = isinstance(loaded, dict) and all(
        isinstance(value, Tensor) for value in loaded.values()
    )
    if not tensors or not loaded:
        raise ModelError(
            f"{path}: a checkpoint must map names to tensors, but got {type(loaded).__name__}"
        )
    return {str(key).removeprefix("module."): value for key, value in loaded.items()}


def _fit_weights(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    problem = _misfit(model, weights)
    if problem:
        # Other libraries' names, or a grid of another size: timm knows how to convert them.
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            weights = dict(checkpoint_filter_fn(weights, model))
        except Exception:  # a filter that fails on foreign weights: the first misfit says more
            raise ModelError(f"{where} does not fit the model: {problem}") from None
        finally:
            logging.disable(level)
        if _misfit(model, weights):
            raise ModelError(f"{where} does not fit the model: {problem}")
    model.load_state_dict(weights)


def _misfit(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    own = model.state_dict()
    missing = [key for key in own if key not in weights]
    unexpected = [key for key in weights if key not in own]
    shapes = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    if shapes:
        key = shapes[0]
        return (
            f"{key} must have the shape {list(own[key].shape)}, but has {list(weights[key].shape)}"
        )
    if missing:
        return f"it lacks {len(missing)} tensors, the first is {missing[0]}"
    if unexpected:
        return f"it has {len(unexpected)} tensors too many, the first is {unexpected[0]}"
    return ""


def weights_digest(model: nn.Module) -> str:
    """Sixteen hexadecimal digits of the names, shapes and values of all weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
