"""Whether a model is given its images in channels-last memory format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from drophot._core import random_state
from drophot._core.model_contexts import evaluating
from drophot.data.samples import first_sample
from drophot.training.mixed_precision import uncached_autocast


def use_channels_last(model: nn.Module, data: Dataset[Any], device: torch.device) -> bool:
    """Whether a model takes the samples of a dataset with their channels last in memory."""
    with random_state.preserved_rng():
        sample = torch.as_tensor(first_sample("dataset", data)[0]).to(device)
    return takes_channels_last(model, torch.stack([sample, sample]))


def takes_channels_last(model: nn.Module, inputs: Tensor) -> bool:
    """Whether the model has convolutions and accepts images in channels-last memory format."""
    if inputs.dim() != 4 or not any(p.dim() == 4 for p in model.parameters()):
        return False
    if inputs.device.type == "cpu" and any(map(_corrupts_memory, model.modules())):
        return False
    weights = [p for p in model.parameters() if p.requires_grad]
    with evaluating(model), torch.enable_grad(), uncached_autocast(inputs.device.type):
        try:
            logits = model(inputs.to(memory_format=torch.channels_last))
            if logits.requires_grad:
                torch.autograd.grad(logits.float().sum(), weights, allow_unused=True)
        except RuntimeError:  # "view size is not compatible with input tensor's size and stride"
            return False
    return True


def _corrupts_memory(module: nn.Module) -> bool:
    """Whether the weight gradient of a convolution may end the process in channels-last format.

    With PyTorch 2.14 on a CPU, it writes beyond its memory if a kernel of size 1 skips pixels and
    has fewer than 8 input channels, as in the shortcuts of a ResNet that lost most of its channels.
    """
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels // module.groups < 8
    )
