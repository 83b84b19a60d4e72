"""Settings of torch's own optimizers during a training: fused, and on a GPU capturable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drophot.training.capture_conditions import is_torch_optimizer

_SWITCHES = ("fused", "capturable")
_COUNTERS = {"step", "mu_product"}  # kept on the CPU by optimizers that are not capturable


@contextmanager
def fused(model: nn.Module, optimizer: Optimizer, device: torch.device) -> Iterator[None]:
    """Let torch's own optimizers update all parameters at once, unless the user chose otherwise."""
    before = [{name: group.get(name) for name in _SWITCHES} for group in optimizer.param_groups]
    on_gpu, counters = False, {}
    if is_torch_optimizer(optimizer) and not any(
        getattr(module, "sparse", False) for module in model.modules()
    ):
        on_gpu = device.type == "cuda"
        # Older versions of torch refuse a fused Adagrad on a GPU. Other devices are untested.
        supported = device.type == "cpu" or (
            on_gpu and not isinstance(optimizer, torch.optim.Adagrad)
        )
        counters = _counters(optimizer) if on_gpu else {}
        for group in optimizer.param_groups:
            chosen = [group.get(name, False) for name in ("fused", "foreach", "differentiable")]
            real = all(p.is_floating_point() for p in group["params"])
            if chosen == [None, None, False] and real and supported:
                group["fused"] = True
            if "capturable" in group and on_gpu:
                group["capturable"] = True
        for (parameter, name), value in counters.items():
            optimizer.state[parameter][name] = torch.as_tensor(value, device=parameter.device)
    try:
        yield
    finally:
        # Parameter groups may have been added in the meantime.
        for group, values in zip(optimizer.param_groups, before, strict=False):
            group.update({name: values[name] for name in _SWITCHES if name in group})
        if on_gpu:
            _restore_counters(optimizer, counters)


def _counters(optimizer: Optimizer) -> dict[tuple[Tensor, str], Any]:
    """The counters of the groups that can be captured, by parameter and name."""
    return {
        (parameter, name): state[name]
        for group in optimizer.param_groups
        if "capturable" in group
        for parameter in group["params"]
        if (state := optimizer.state.get(parameter))
        for name in _COUNTERS & state.keys()
    }


def _restore_counters(optimizer: Optimizer, before: dict[tuple[Tensor, str], Any]) -> None:
    """Give counters the type and the device that they have outside of a captured step."""
    on_device = {
        parameter
        for group in optimizer.param_groups
        if group.get("capturable") or group.get("fused") or isinstance(optimizer, torch.optim.ASGD)
        for parameter in group["params"]
    }
    for (parameter, name), value in _counters(optimizer).items():
        old = before.get((parameter, name))
        if isinstance(old, Tensor):
            value = value.to(old)
        elif old is not None:
            value = type(old)(value)
        elif parameter not in on_device:
            value = value.cpu()
        optimizer.state[parameter][name] = value
