"""SpeedLab: fast, small and measured Stable Diffusion inference for ComfyUI."""

import sys

# A test runner may import this file as a package of its own, outside of ComfyUI, where there is nothing to register.
if __package__ and "folder_paths" in sys.modules:
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
    from .speedlab.web import routes

    WEB_DIRECTORY = "./js"
    routes.register()

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
