"""The weights of a model that draws, as factors, and its latents."""
