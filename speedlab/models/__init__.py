"""Checkpoints, LoRAs, text encoding, UNet layouts, and what a LATENT tells about its maker."""
