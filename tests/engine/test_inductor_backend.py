"""Inductor's code for convolutions of either layout."""

from __future__ import annotations

import pytest
import torch

from speedlab.techniques.compile.backends import CompileOptions, inductor


@torch.inference_mode()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.full
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
