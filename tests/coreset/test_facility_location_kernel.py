"""The Triton kernels of facility location."""

import inspect
from typing import Any

import pytest
import torch
from helpers.interpreter import needs_triton

from drophot import facility_location


@needs_triton
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_the_kernels_compile_for_a_gpu(dtype: str) -> None:
    compiler = pytest.importorskip("triton.compiler")
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", 80, 32)
    from drophot.coreset import facility_location_kernel as kernels

    floats = ("distances", "nearest", "before")
    types = dict.fromkeys(floats, f"*{dtype}") | {"changed": "*i32", "num_changed": "*i32"}
    types |= dict.fromkeys(("gains", "owner", "ranking", "ranked_gains", "best"), "*i64")
    types |= dict.fromkeys(("step", "number", "total", "programs"), "i32")
    fixed = {"block": 64, "rows": 32, "bits": 46, "slots": 1024}
    for kernel in (kernels._take_best, kernels._lower_gains):
        names = kernel.arg_names
        signature = {name: types.get(name, "constexpr") for name in names}
        constants: dict[Any, int] = {name: fixed[name] for name in names if name in fixed}
        if "constexprs" in inspect.signature(compiler.ASTSource).parameters:
            constants = {(names.index(name),): value for name, value in constants.items()}
        source = compiler.ASTSource(kernel, signature, constants)
        assert "ptx" in compiler.compile(source, target=target).asm


@pytest.mark.gpu
@pytest.mark.parametrize("by_class", [False, True])
def test_on_a_gpu(by_class: bool) -> None:
    pytest.importorskip("triton")
    draws = torch.Generator().manual_seed(0)
    points = torch.randn(3000, 40, generator=draws, dtype=torch.float64)
    targets = torch.arange(3000) % 3 if by_class else None
    expected = facility_location(points, 0.1, targets=targets)
    found = facility_location(
        points.cuda(), 0.1, targets=None if targets is None else targets.cuda()
    )
    assert torch.equal(found.ranking, expected.ranking)
    assert torch.allclose(found.gains, expected.gains)
    assert torch.equal(found.weights, expected.weights)
