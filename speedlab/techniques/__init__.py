"""One folder a technique: config, algorithm, attach."""
