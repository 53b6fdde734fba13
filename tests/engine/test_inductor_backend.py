"""What inductor is told: not to convert live weights of convolutions in every call on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from speedlab.techniques.compile.backends import CompileOptions, inductor


@pytest.mark.parametrize(
    ("freeze", "device", "kept"), [(False, "cpu", False), (True, "cpu", True), (False, "meta", True)]
)
def test_weights_keep_their_layout_where_they_are_live_and_on_a_cpu(monkeypatch, freeze, device, kept):
    told: dict[str, Any] = {}

    def compile(_graph, _inputs, options):
        told.update(options)
        return lambda *inputs: inputs

    monkeypatch.setattr(torch._inductor, "compile", compile)
    graph = torch.fx.symbolic_trace(torch.nn.Identity())
    inductor._compile_graph(CompileOptions(freeze=freeze), graph, [torch.ones(1, device=device), 3])
    assert told.get("layout_optimization", True) is kept


@torch.inference_mode()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions_of_either_layout_give_eager_results(layout):
    torch._dynamo.reset()
    network = torch.nn.Sequential(
        torch.nn.Conv2d(8, 16, 3, padding=1), torch.nn.GroupNorm(4, 16), torch.nn.SiLU(), torch.nn.Conv2d(16, 8, 3)
    )
    network = network.eval().requires_grad_(False).to(memory_format=layout)
    x = torch.randn(2, 8, 16, 16).contiguous(memory_format=layout)
    program = torch.compile(network, backend=lambda g, i: inductor._compile_graph(CompileOptions(), g, i))
    assert torch.allclose(program(x), network(x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
