"""Decoding: precision, tiles, TAESD, compiled decoders."""
