"""The SpeedLab engine: no node classes, no user interface."""

__version__ = "0.2.0"
