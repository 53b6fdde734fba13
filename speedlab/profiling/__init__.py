"""Measuring: clocks, NVTX ranges, memory, the record of a run and where it is kept."""
