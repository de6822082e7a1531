"""Merged models as ONNX graphs: traced pieces of a model, with the steps of a plan in between."""
