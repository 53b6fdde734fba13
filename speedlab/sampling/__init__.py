"""Profiled sampling, the base and refiner ensemble, staged prompts."""
