"""Techniques that make sampling faster, one file each; `patching` alone knows ComfyUI's wrapper sites."""
