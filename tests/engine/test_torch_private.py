"""Private names of PyTorch have one home, so that a change of PyTorch is looked for in one place.

Ruff's banned-api takes whole names, not every name with an underscore below `torch`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from speedlab.common import torch_private
from speedlab_tools.host import pack_root

# Attributes that every module has had since PyTorch began.
OLD = {"_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"}


def private_names(source: str) -> Iterator[str]:
    """Dotted names below `torch` with a part that begins with an underscore."""
    for node in ast.walk(ast.parse(source)):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found = [f"{node.module}.{name.name}" for name in node.names]
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            found = [ast.unparse(node)]
        for name in found:
            first, *rest = name.split(".")
            if first == "torch" and any(part[:1] == "_" and part[:2] != "__" and part not in OLD for part in rest):
                yield name


def test_private_names_of_pytorch_are_used_in_one_module() -> None:
    home = Path(torch_private.__file__)
    assert "torch._dynamo" in set(private_names(home.read_text(encoding="utf-8")))
    # The stressed server's own node travels without the pack.
    away = pack_root() / "speedlab_tools" / "stress" / "probe"
    strays = {
        str(path.relative_to(pack_root())): sorted(names)
        for folder in ("speedlab", "speedlab_tools", "nodes")
        for path in (pack_root() / folder).rglob("*.py")
        if path != home and away not in path.parents and (names := set(private_names(path.read_text(encoding="utf-8"))))
    }
    assert not strays
