"""SpeedLab profiling."""
