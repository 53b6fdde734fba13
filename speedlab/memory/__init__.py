"""Fitting models into little memory: what a run will need, and weights that are on the device only while they work."""
