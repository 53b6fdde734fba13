"""Clocks, peaks, kernels, NVTX, the record, its store and charts."""
