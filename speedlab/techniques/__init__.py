"""One folder a technique: config, algorithm, attach. `cpu` holds what several of them use on a CPU."""
