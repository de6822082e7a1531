"""Multiply-adds of any model, counted by torchprofile from one traced forward.

What is counted is what the papers print: the products of convolutions, linear layers and
attention (fused and unfused alike), and those by which a merging block compares tokens. Norms,
elementwise products and the product that applies a merge are not, as in ``MergePlan.macs``.
An operator of unknown cost is an error here; torchprofile itself skips it with a warning.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torchprofile.handlers import HANDLER_MAP
from torchprofile.ir import Node
from torchprofile.trace import trace

from dsm_tune.errors import ModelError

__all__ = ["FREE", "PRODUCTS", "count_macs"]

_COUNTED = "_convolution addmm addmv bmm einsum linear lstm matmul scaled_dot_product_attention"
PRODUCTS = frozenset(f"aten::{name}" for name in _COUNTED.split())

# Operators that cost no multiply-add by our definition, each with the reason. Those to which
# torchprofile itself gives no cost need no entry.
_REASONS = {
    "applies a merge: the one-hot product that stands for a gather": "baddbmm",
    "a norm": "batch_norm group_norm instance_norm layer_norm linalg_vector_norm rms_norm",
    "elementwise": "__and__ addcmul bitwise_not ceil clamp_min hardsigmoid hardsigmoid_ hardswish"
    " hardswish_ leaky_relu log log_ masked_fill mul mul_ reciprocal remainder silu_ where",
    "one addition per element": "adaptive_avg_pool1d adaptive_avg_pool2d avg_pool1d avg_pool2d"
    " cumsum mean",
    "orders or picks": "amax argsort index_select roll scatter sort tril",
    "makes or views a tensor": "expand_as new_ones new_zeros ones ones_like pad reshape_as type_as"
    " unbind",
}
FREE = {f"aten::{name}": reason for reason, names in _REASONS.items() for name in names.split()}


@torch.no_grad()
def count_macs(model: nn.Module, image: Tensor) -> int:
    """Count the multiply-adds of one forward.

    Args:
        model: any model, merged or not, in eval mode.
        image: [1, 3, H, W], on the model's device.

    Returns:
        Multiply-adds of this image.

    Raises:
        ModelError: if the model has an operator whose cost is not known.
    """
    if image.ndim != 4 or len(image) != 1:
        raise ModelError(f"image must have the shape [1, 3, H, W], but got {list(image.shape)}")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # the tracer warns of Python values; the shape is fixed here
        graph = trace(model, image)
    return sum(_macs_of(node) for node in graph.nodes)


def _macs_of(node: Node) -> int:
    handler = HANDLER_MAP.get(node.operator)
    if node.operator in PRODUCTS and handler is not None:
        macs = int(handler(node))
        if macs:
            return macs
    elif node.operator in FREE or (node.operator in HANDLER_MAP and handler is None):
        return 0
    raise ModelError(
        f"the multiply-adds of a model must all be known, but got the operator {node.operator} "
        f"in {node.scope or 'its forward'}; accepted are those of dsm_tune.measuring.macs"
    )
