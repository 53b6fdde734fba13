"""SpeedLab accelerate."""
