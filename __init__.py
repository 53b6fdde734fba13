"""SpeedLab: fast, small and measured Stable Diffusion inference for ComfyUI."""

# pytest imports this file as a bare module; relative imports need a package, as ComfyUI gives it.
if __package__:
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    WEB_DIRECTORY = "./js"

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
