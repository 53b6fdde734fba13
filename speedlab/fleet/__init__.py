"""Many ComfyUI workers on a Ray cluster, one result a prompt."""
