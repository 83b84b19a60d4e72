"""An operator of a user's own, a network with it, and its rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from drophot.structured import OperatorCall


@torch.library.custom_op("drophot_tests::linear_relu", mutates_args=())
def linear_relu(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight.T).relu()


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x, weight, output = ctx.saved_tensors
    gradient = gradient * (output > 0)
    return gradient @ weight, gradient.T @ x


linear_relu.register_autograd(_backward, setup_context=_keep)


class LinearReLU(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return linear_relu(x, self.weight)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 16), LinearReLU(16, 8), nn.Linear(8, 3))


def rule(call: OperatorCall, x: Tensor, weight: Tensor) -> None:
    call.couple((x, -1), (weight, 1))
    call.couple((weight, 0), (call.outputs[0], -1))


def rule_of_inputs(call: OperatorCall, x: Tensor, weight: Tensor) -> None:
    """Couples less than `rule`: the outputs of the layer stay."""
    call.couple((x, -1), (weight, 1))
