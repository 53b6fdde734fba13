"""A sweep: many settings of one graph, measured in turn and compared. Node `SpeedLabBenchmark` is its face."""
