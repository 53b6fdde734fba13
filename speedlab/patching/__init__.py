"""Wrappers on a clone, the place in a schedule, notes of a run, and whether a model is compiled."""
