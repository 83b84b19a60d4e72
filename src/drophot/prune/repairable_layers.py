"""The layers whose outputs can be corrected through their weights, and why others cannot be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from drophot.prune.current_parameters import own_names
from drophot.prune.linear_layers import weights_of
from drophot.prune.prunable_weights import check_changeable, joined

_KINDS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.SyncBatchNorm,
    _BatchNorm,
)


class RemovedChannels(Protocol):
    """What `repair` reads from a `drophot.structured.Pruned`."""

    @property
    def kept_channels(self) -> Mapping[str, Tensor]:
        """The indices of the outputs that each layer kept, by its weight's name."""
        ...

    @property
    def kept_norm_channels(self) -> Mapping[str, Tensor]:
        """The indices of the channels that each norm kept, by its weight's name."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairableLayer:
    """A layer of the pruned model and its counterpart in the dense one."""

    module: nn.Module
    dense: nn.Module
    kept: Tensor | None
    """The channels that are left of the dense layer's; all if `None`."""
    num_channels: int

    @property
    def is_norm(self) -> bool:
        """Whether it is a BatchNorm layer."""
        return isinstance(self.module, _BatchNorm)

    @property
    def shifts(self) -> bool:
        """Whether the layer has a bias, so that its mean can be matched too."""
        return self.module._parameters.get("bias") is not None

    def channel_dim(self, outputs: Tensor) -> int:
        """The dimension of the channels in its outputs."""
        if isinstance(self.module, nn.Linear):
            return outputs.dim() - 1
        if isinstance(self.module, _ConvNd):
            return outputs.dim() - len(self.module.kernel_size) - 1
        return 1

    def corrected(self, scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
        """Its weight and bias, so that each channel `y` of its outputs is `scale * y + shift`."""
        new = {}
        for name in ("weight", "bias") if self.shifts else ("weight",):
            before = self.module.get_parameter(name).detach()
            wide = before.double() if before.device.type != "mps" else before.float()
            factor = scale.to(wide)
            if name == "bias":
                wide = wide * factor + shift.to(wide)
            elif isinstance(self.module, _ConvTransposeNd):  # (in, out / groups, *kernel)
                groups = self.module.groups
                grouped = wide.reshape(groups, -1, *wide.shape[1:])
                spread = factor.view(groups, 1, -1, *[1] * (wide.dim() - 2))
                wide = (grouped * spread).reshape(wide.shape)
            else:
                wide = wide * factor.view(-1, *[1] * (wide.dim() - 1))
            new[name] = wide.to(before.dtype)
        return new


def find_layers(
    model: nn.Module, dense: nn.Module, pruned: RemovedChannels | None
) -> tuple[dict[str, RepairableLayer], dict[str, str]]:
    """The repairable layers by path, and the reasons why others are not."""
    counterparts = dict(dense.named_modules())
    kept: dict[str, Tensor] = {}
    if pruned is not None:
        kept = {**pruned.kept_channels, **pruned.kept_norm_channels}
        named = own_names(kept, [name for name, _ in model.named_parameters()])
        kept = {named[name]: indices for name, indices in kept.items()}
    uses = Counter(
        id(one)
        for module in model.modules()
        for one in module._parameters.values()
        if one is not None
    )
    paths = own_names([path for path, _ in model.named_modules()], counterparts)
    found, reasons = {}, {}
    for path, module in model.named_modules():
        if not isinstance(module, _KINDS):
            if weights_of(module):
                reasons[path] = "it is not a Conv, Linear or BatchNorm layer"
            continue
        if why := _obstacle(module, uses):
            reasons[path] = why
            continue
        name, weight = joined(path, "weight"), module.get_parameter("weight")
        if is_lazy(weight):
            raise ValueError(
                f"`model` must be initialized, but `{path}` is a lazy layer that has seen no data. "
                f"Run one batch through the model first."
            )
        check_changeable(name, weight)
        number = _num_channels(module)
        other = counterparts.get(paths[path])
        before = _num_channels(other) if isinstance(other, _KINDS) else None
        indices = kept.get(name)
        if indices is not None and _loses_in_groups(module, other, number):
            reasons[path] = "the channels left in its groups are not recorded"
            continue
        left = before if indices is None else len(indices)
        outside = indices is not None and len(indices) and int(indices.max()) >= (before or 0)
        if other is None or before is None or left != number or outside:
            raise ValueError(
                f"`dense` must be the model before pruning, but the {number} channels of "
                f"`{path or 'the model'}` in `model` do not come from the "
                f"{before or 'missing'} channels there. If channels were removed, pass the "
                f"result of `prune_channels` as `pruned`."
            )
        found[path] = RepairableLayer(
            module=module,
            dense=other,
            kept=None if left == before else indices,
            num_channels=number,
        )
    return found, reasons


def _obstacle(module: nn.Module, uses: Mapping[int, int]) -> str:
    """Why the outputs of a layer cannot be scaled through its weight; empty if they can."""
    base = next(kind for kind in _KINDS if isinstance(module, kind))
    kind = type(module)
    own = [
        getattr(one, name, None) for one in (kind, base) for name in ("forward", "_conv_forward")
    ]
    weight = module._parameters.get("weight")
    if isinstance(module, _BatchNorm) and not module.affine:
        return "it has no weight and bias"
    if weight is None:
        return "its weight is computed from other parameters"
    if own[:2] != own[2:]:
        return "it overrides `forward`"
    if "forward" in vars(module):
        return "its `forward` was replaced"
    if any(uses[id(one)] > 1 for one in module._parameters.values() if one is not None):
        return "it shares its parameters with another layer"
    return ""


def _loses_in_groups(module: nn.Module, other: nn.Module | None, number: int) -> bool:
    """Whether a transposed convolution lost channels of its groups."""
    return (
        isinstance(module, _ConvTransposeNd)
        and isinstance(other, _ConvTransposeNd)
        and other.groups > 1
        and number != other.out_channels
    )


def _num_channels(module: nn.Module) -> int:
    for name in ("out_features", "out_channels", "num_features"):
        if isinstance(number := getattr(module, name, None), int):
            return number
    raise AssertionError(type(module).__name__)


def means_and_variances(values: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """The mean and the unbiased variance of each channel."""
    exact = values if values.dtype in (torch.float32, torch.float64) else values.float()
    over = [dim for dim in range(values.dim()) if dim != channels]
    variance, mean = torch.var_mean(exact, over, correction=1)
    wide = torch.float32 if mean.device.type == "mps" else torch.float64
    return mean.to(wide), variance.to(wide)
