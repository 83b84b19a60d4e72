"""How much memory a training step takes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def step_memory(model: nn.Module, inputs: Tensor, targets: Tensor) -> int:
    """Bytes for weights, gradients, two moving averages and the activations saved for backward.

    Runs one forward pass, which updates BatchNorm's running statistics. The workspace of libraries
    such as cuDNN is not included.
    """
    weights = sum(tensor.nbytes for tensor in model.parameters())
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = F.cross_entropy(model(inputs), targets)
    del loss  # until here no two saved tensors can have the same address
    for parameter in model.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    return 4 * weights + sum(saved.values())
