"""Classifier-free guidance: leaving out uncond where it changes little."""
