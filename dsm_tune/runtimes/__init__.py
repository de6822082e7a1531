"""How a merged model is run where it is served: eager, or as a CUDA graph."""
