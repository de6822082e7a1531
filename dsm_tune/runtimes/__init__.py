"""How a merged model is run where it is served: eager, in ONNX Runtime, or as a CUDA graph."""
