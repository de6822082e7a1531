"""Why the tokens of some of timm's models cannot be merged, by the name of their class."""

from __future__ import annotations

__all__ = ["reason_for"]

_NO_TOKENS = "whose convolutions need the whole grid, not a set of tokens"
_GRID = "whose stages read tokens from their places on a whole grid"
_BIAS = (
    "where every block adds a bias for each pair of places, and a merged token has several places"
)
_ROTARY = (
    "where every block turns queries and keys by their place, and a merged token has several places"
)
_FIXED = "whose weights mix a fixed number of tokens"
_WINDOWS = "whose attention is cut into windows of a whole grid"
_POOLS = "which pools the grid between its stages"

# One entry per family; `__name__`s, so that an older or newer timm needs none of these classes.
_REASONS = {
    "Beit": _BIAS,
    "ByobNet": _NO_TOKENS,
    "Cait": "which mixes heads within the attention and adds its class token later",
    "CoaT": _GRID,
    "ConvMixer": _NO_TOKENS,
    "ConvNeXt": _NO_TOKENS,
    "CrossVit": "which fuses two sequences of different patches in every stage",
    "DaVit": _WINDOWS,
    "EfficientFormer": _GRID,
    "EfficientNet": _NO_TOKENS,
    "Eva": _ROTARY,
    "GlobalContextVit": _WINDOWS,
    "Hiera": _POOLS,
    "HieraDet": _POOLS,
    "LevitDistilled": _BIAS,
    "MaxxVit": _WINDOWS,
    "MlpMixer": _FIXED,
    "MobileNetV3": _NO_TOKENS,
    "MultiScaleVit": _POOLS,
    "NaFlexVit": "whose patches vary in number from image to image",
    "PoolingVisionTransformer": _POOLS,
    "RegNet": _NO_TOKENS,
    "ResNet": _NO_TOKENS,
    "ResNetV2": _NO_TOKENS,
    "SwinTransformer": _WINDOWS,
    "SwinTransformerV2": _WINDOWS,
    "TNT": "where each patch has a sequence of its own within",
    "Twins": _WINDOWS,
    "VGG": _NO_TOKENS,
    "VOLO": _GRID,
    "VisionTransformerRelPos": _BIAS,
    "VisionTransformerSAM": _BIAS,
    "Xcit": "whose attention is across channels, with convolutions over the grid",
}


def reason_for(kind: type) -> str:
    """Why models of a class are refused, in a few words that begin by naming the class."""
    known = next(
        (_REASONS[base.__name__] for base in kind.__mro__ if base.__name__ in _REASONS), ""
    )
    return (
        f"its class is {kind.__name__}, {known or 'whose forward may differ from what is merged'}"
    )
