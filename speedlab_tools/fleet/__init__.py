"""Scenarios on several machines through Ray."""
