"""SpeedLab bench."""
