"""TF32, autocast, accumulation and memory format for the time of a run."""
