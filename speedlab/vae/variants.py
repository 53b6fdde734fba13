"""What nodes made of a VAE object, and how a second module of its weights (another dtype) becomes the same.

A VAE has no clone and no attachments that follow it: a node that changes one hands out a second VAE object. Compile VAE
and Memory Plan note here, by name, how they do to another module of the same weights what they did to this one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..common.errors import UnavailableError

_DERIVATIONS = "speedlab_derivations"
_DECODES_BY = "speedlab_decodes_by"
COMPILED = "compile"
# On the network of a compiled VAE: its programs hold the weights once more.
HOLDS_WEIGHTS = "speedlab_holds_weights"


@dataclass(frozen=True)
class Derivation:
    """Something that a node did to a VAE: its name for the record, and how it is done to another VAE."""

    described: str
    of: Callable[[Any], Any]


class Placement(Protocol):
    """What the patcher of a VAE under a memory plan bears as `placement`."""

    @property
    def streams(self) -> bool:
        """Whether weights come to the device layer by layer."""

    def settle(self) -> None:
        """Bring home what a forward that was cut off left on the device."""


def placement_of(vae: Any) -> Placement | None:
    """The memory plan of a VAE; None without one."""
    placement: Placement | None = getattr(vae.patcher, "placement", None)
    return placement


def derivations_of(vae: Any) -> Mapping[str, Derivation]:
    """What was done to a VAE, by name, in the order in which it was done."""
    found: Mapping[str, Derivation] = getattr(vae, _DERIVATIONS, {})
    return found


def set_derivation(vae: Any, name: str, derivation: Derivation | None) -> None:
    """Note on a VAE object of our own how `name` is done to another one; None: it is no longer done."""
    others = {key: one for key, one in derivations_of(vae).items() if key != name}
    setattr(vae, _DERIVATIONS, others if derivation is None else {**others, name: derivation})


def is_compiled_vae(vae: Any) -> bool:
    """Whether Compile VAE made this VAE."""
    return COMPILED in derivations_of(vae)


def decoding_by(vae: Any, words: str, decode: Callable[[Any], Any], encoder: Any) -> Any:
    """A second VAE object for all nodes that decode with it: `decode` makes the images of latents, `encoder` encodes.

    `words` say how it decodes, in the message of a node that cannot follow that.
    """
    second = copy.copy(vae)
    for name in ("decode", "decode_tiled"):
        setattr(second, name, lambda samples, *_args, **_kwargs: decode(samples))
    if encoder is not vae:
        for name in ("encode", "encode_tiled"):
            setattr(second, name, getattr(encoder, name))
    setattr(second, _DECODES_BY, words)
    return second


def refuse_decoding_by(vae: Any, who: str) -> None:
    """Refuse, for a node named `who`, a VAE of `decoding_by`. Raises UnavailableError."""
    words = getattr(vae, _DECODES_BY, None)
    if words is not None:
        raise UnavailableError(
            f"{who} cannot act on the VAE of Accelerate, which decodes by {words}. Put {who} before Accelerate, or "
            "into its plan."
        )
