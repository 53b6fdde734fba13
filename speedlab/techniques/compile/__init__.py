"""Compilers: graph by graph (inductor) or whole programs (OpenVINO, TensorRT)."""
