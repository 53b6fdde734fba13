"""A client of ComfyUI's HTTP API, graphs for it, and the files that a command is given."""
