"""Nodes that run a model as a compiled program: each returns a clone or a second object, and leaves its input eager."""

from __future__ import annotations

from typing import Any

from ..speedlab.techniques.compile.attach import DYNAMIC, ON_FAILURE, SCOPES, CompileConfig, attach_compile
from ..speedlab.techniques.compile.backends import FOR_VAE, MODES, NAMES, QUANTIZE
from ..speedlab.vae.compile import compile_vae

_CATEGORY = "SpeedLab/accelerate"


class CompileModel:
    """Run the UNet as compiled code."""

    NODE_ID = "SpeedLabCompileModel"
    DISPLAY_NAME = "Compile Model (SpeedLab)"
    CATEGORY = _CATEGORY
    SEARCH_ALIASES = ["fast", "speed", "torch.compile", "cuda graphs", "tensorrt", "onnx", "openvino", "onediff"]
    DESCRIPTION = (
        "Compiles the UNet block by block or as a whole. The first image takes longer, the next ones are faster. "
        "A LoRA, another checkpoint of the family or another size does not start all over. What a backend cannot do "
        "is an error that says so. For SD 1.x, SD 2.x and the SDXL family."
    )
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("A patched clone that runs compiled; the input model stays as it is.",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "An SD 1.x, SD 2.x or SDXL-family model."}),
                "backend": (
                    list(NAMES),
                    {
                        "default": "inductor",
                        "tooltip": "inductor: PyTorch's compiler. cudagraphs: replays recorded kernels. jit_trace: a "
                        "trace for each size. onnxruntime, openvino: fast on CPUs. onediff_*, stable_fast, "
                        "tensorrt: NVIDIA GPUs, where installed.",
                    },
                ),
                "scope": (
                    list(SCOPES),
                    {
                        "default": "auto",
                        "tooltip": "blocks: each block by itself; works with DeepCache, ControlNet and patches. "
                        "model: one program. auto: blocks for inductor and cudagraphs, else model.",
                    },
                ),
                "mode": (
                    list(MODES),
                    {
                        "default": "default",
                        "tooltip": "How hard to optimise. reduce-overhead: with CUDA graphs. max-autotune: tries "
                        "kernels, which takes long to compile. Most backends know only default.",
                    },
                ),
                "dynamic": (
                    list(DYNAMIC),
                    {
                        "default": "auto",
                        "advanced": True,
                        "tooltip": "auto: the first size exactly, from the second on for any size. true: for any size "
                        "at once. false: each size by itself. For inductor and cudagraphs.",
                    },
                ),
                "on_failure": (
                    list(ON_FAILURE),
                    {
                        "default": "error",
                        "advanced": True,
                        "tooltip": "What happens if compiling fails. error: stop and say why. eager: go on "
                        "uncompiled, and note it in the record.",
                    },
                ),
            },
            "optional": {
                "freeze_weights": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "advanced": True,
                        "tooltip": "Fold the weights into the program: faster on CPUs, needs the memory of the "
                        "weights once more, and each change of a LoRA compiles again. For inductor and jit_trace.",
                    },
                ),
                "quantize": (
                    list(QUANTIZE),
                    {
                        "default": "off",
                        "advanced": True,
                        "tooltip": "int8: convolutions and linear layers in 8 bits, those that the image allows. The "
                        "first image measures which, for as long as some images take; that is kept on disk. For "
                        "openvino.",
                    },
                ),
            },
        }

    def apply(
        self,
        model: Any,
        backend: str,
        scope: str,
        mode: str,
        dynamic: str,
        on_failure: Any,
        freeze_weights: bool = False,
        quantize: str = "off",
    ) -> tuple[Any]:
        config = CompileConfig(backend, scope, mode, dynamic, on_failure, freeze_weights, quantize)
        return (attach_compile(model, config),)


class CompileVAE:
    """Run the VAE's decoder as compiled code."""

    NODE_ID = "SpeedLabCompileVAE"
    DISPLAY_NAME = "Compile VAE (SpeedLab)"
    CATEGORY = _CATEGORY
    SEARCH_ALIASES = ["fast", "speed", "torch.compile", "inductor", "fast decode"]
    DESCRIPTION = (
        "Compiles the decoder of a VAE, full or tiny, for all nodes that decode with it. The first image takes "
        "longer. Encoding stays as it is."
    )
    RETURN_TYPES = ("VAE",)
    RETURN_NAMES = ("vae",)
    OUTPUT_TOOLTIPS = ("A second VAE on the same weights whose decoder is compiled; the input VAE stays as it is.",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "vae": ("VAE", {"tooltip": "A full VAE, or a Tiny VAE that core's Load VAE gives."}),
                "backend": (
                    list(FOR_VAE),
                    {
                        "default": "inductor",
                        "tooltip": "inductor: PyTorch's compiler. onnxruntime: fast on CPUs. jit_trace: a trace "
                        "for each size.",
                    },
                ),
                "mode": (
                    list(MODES),
                    {
                        "default": "default",
                        "tooltip": "How hard to optimise; all but default are for inductor. reduce-overhead: with "
                        "CUDA graphs. max-autotune: tries kernels, which takes long to compile.",
                    },
                ),
            },
        }

    def apply(self, vae: Any, backend: str, mode: str) -> tuple[Any]:
        return (compile_vae(vae, backend, mode),)


NODES = (CompileModel, CompileVAE)
