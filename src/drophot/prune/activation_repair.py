"""Repair a pruned model without training: match its activations to those of the dense model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from drophot._core import distributed
from drophot._core.model_contexts import evaluating
from drophot._core.user_warnings import warn
from drophot.prune.calibration import inputs_of, merged, unwrapped
from drophot.prune.eager_mode import eagerly, uncached
from drophot.prune.repairable_layers import (
    RemovedChannels,
    RepairableLayer,
    find_layers,
    means_and_variances,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NO_BIAS = "it has no bias, so only its standard deviation was matched"
_NOT_CALLED = "no batch reached it as a module"


def repair(
    model: nn.Module,
    dense: nn.Module,
    loader: Iterable[Any],
    *,
    pruned: RemovedChannels | None = None,
    group: ProcessGroup | None = None,
) -> None:
    r"""Match the mean and the standard deviation of a pruned model's activations to the dense ones.

    Pruning shrinks the variance of the activations, layer after layer. Here each output channel
    :math:`y` of each Conv, Linear and BatchNorm layer is scaled and shifted, so that its mean and
    its standard deviation are those of the same channel in the dense model:

    .. math::
        y' = \frac{\sigma_d}{\sigma_p} (y - \mu_p) + \mu_d

    The correction is part of the weight and the bias of the layer afterwards, or of those of
    BatchNorm; the architecture stays, and weights that are zero stay zero. No labels, gradients or
    training steps are needed.

    In one pass, both models are called with each batch. The outputs of the pruned model's layers
    are corrected to the dense model's statistics of the same batch, so that each layer is measured
    on what corrected layers before it compute. :math:`\mu` is the mean of the batches' means and
    :math:`\sigma^2` that of their unbiased variances, each weighted by its number of values. A
    model that equals the dense one is thus unchanged up to rounding. For a single batch, the
    repaired model has exactly the dense statistics; with several, use batches of 64 or more.
    A channel that is constant in either model is only shifted.

    A Conv or Linear layer without a bias whose output goes to BatchNorm is left as it is, since
    the correction of BatchNorm includes it. Running statistics are not changed:
    `recalibrate_bn` is not needed before or after. A warning names every layer that cannot be
    repaired, with the reason: it has no bias, shares its weight, overrides `forward`, is not
    called as a module (as in `nn.MultiheadAttention`) or is of another kind.

    With several processes, call it on every rank of the group with that rank's batches, as
    `recalibrate_bn`: all ranks get the same weights. Modes and the random state are restored.

    References:
        Jordan et al., REPAIR: REnormalizing Permuted Activations for Interpolation Repair, ICLR
        2023, https://arxiv.org/abs/2211.08403.

    Args:
        model: The pruned model, called as `model(inputs)`. `DistributedDataParallel`,
            `DataParallel` and `torch.compile` are unwrapped.
        dense: The model before pruning, such as a `copy.deepcopy`. It is unchanged.
        loader: Yields batches, as for `recalibrate_bn`.
        pruned: The result of `drophot.structured.prune_channels`, if channels were removed. The
            channels that are left are compared with the same channels of the dense model. It fits
            the model whether that was wrapped when it was pruned or not.
        group: The ranks that take part; `None` means all.

    Raises:
        TypeError: If a batch does not have a tensor of inputs first.
        ValueError: If `dense` is `model` or has other layers, the model has no layer that can be
            repaired, or a lazy one, the loader is empty (on all ranks), a batch has only one value
            per channel, an activation or a new weight is not finite, or this rank is not in
            `group`. The model is unchanged then, and also if the loader or the model raises. If one
            rank fails, the others raise a ValueError.

    Example:
        >>> dense, model = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> _ = dense.load_state_dict({"weight": torch.tensor([[2.0]]), "bias": torch.ones(1)})
        >>> _ = model.load_state_dict({"weight": torch.tensor([[1.0]]), "bias": torch.zeros(1)})
        >>> repair(model, dense, [torch.tensor([[1.0], [3.0]])])
        >>> model.weight.item(), model.bias.item()
        (2.0, 1.0)
    """
    if distributed.count(group) < 1:
        raise ValueError(
            "`group` must contain this rank. Call `repair` only on the ranks of the group."
        )
    _repair(model, dense, loader, pruned, group, alone=distributed.count(group) == 1)


def repair_alone(
    model: nn.Module, dense: nn.Module, loader: Iterable[Any], pruned: RemovedChannels | None
) -> None:
    """`repair` on this rank only, regardless of the other ranks."""
    _repair(model, dense, loader, pruned, None, alone=True)


def _repair(
    model: nn.Module,
    dense: nn.Module,
    loader: Iterable[Any],
    pruned: RemovedChannels | None,
    group: ProcessGroup | None,
    *,
    alone: bool,
) -> None:
    inner, dense = unwrapped(model), unwrapped(dense)
    if inner is dense or {id(one) for one in inner.parameters()} & set(map(id, dense.parameters())):
        raise ValueError(
            "`dense` must be another model than `model`, with its own parameters. Before pruning, "
            "copy it: dense = copy.deepcopy(model)."
        )
    layers, reasons = find_layers(inner, dense, pruned)
    if not layers:
        raise ValueError(
            f"`model` must have Conv, Linear or BatchNorm layers that can be repaired, but "
            f"{type(inner).__name__} has none"
            + "".join(f"; `{path}`: {why}" for path, why in list(reasons.items())[:3])
            + "."
        )
    rows: dict[str, Tensor] = {}
    failure: Exception | None = None
    try:
        with _measuring(layers) as pass_:
            _run(model, inner, dense, loader, pass_)
        rows = pass_.rows
    except Exception as error:
        if alone:
            raise
        failure = error  # the other ranks are waiting for this one
    if not alone:
        channels = {path: layer.num_channels for path, layer in layers.items()}
        device = next(iter(layers.values())).module.get_parameter("weight").device
        rows = merged("repair", "repairable", channels, rows, 4, failure, group, device)
    _write(layers, rows)
    for path, layer in layers.items():
        if path not in rows or not rows[path][-2]:
            reasons[path] = _NOT_CALLED
        elif not layer.shifts and not rows[path][-1]:
            reasons[path] = _NO_BIAS
    if reasons:
        warn(
            "`repair` could not repair these layers: "
            + "; ".join(f"`{path}` ({why})" for path, why in reasons.items())
            + "."
        )


def _run(
    model: nn.Module, inner: nn.Module, dense: nn.Module, loader: Iterable[Any], pass_: _Pass
) -> None:
    with ExitStack() as stack:
        device, dense_device = (stack.enter_context(evaluating(one)) for one in (model, dense))
        stack.enter_context(eagerly())
        for one in {device.type: device, dense_device.type: dense_device}.values():
            stack.enter_context(uncached(one))
        for batch in loader:
            inputs = inputs_of(batch, inner)
            dense(inputs.to(dense_device))
            inner(inputs.to(device))
            pass_.end_batch()


@contextmanager
def _measuring(layers: Mapping[str, RepairableLayer]) -> Iterator[_Pass]:
    found = _Pass(layers)
    hooks = []
    try:
        for path, layer in layers.items():
            if layer.is_norm:
                hooks.append(layer.dense.register_forward_pre_hook(found.enters_norm))
            hooks.append(layer.dense.register_forward_hook(found.dense_hook(path)))
            hooks.append(layer.module.register_forward_hook(found.pruned_hook(path)))
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class _Pass:
    """Measures the dense model's layers, and corrects the outputs of the pruned model's."""

    def __init__(self, layers: Mapping[str, RepairableLayer]) -> None:
        self.layers = layers
        self.rows: dict[str, Tensor] = {}
        """By path: dense means and variances and pruned ones, each times the number of values, that
        number, and whether BatchNorm includes the correction; on the CPU, in float64."""
        self._targets: dict[str, deque[tuple[Tensor, Tensor]]] = {path: deque() for path in layers}
        self._last: tuple[str, Tensor] | None = None
        self._into_norms: set[str] = set()

    def end_batch(self) -> None:
        """Check that both models have called the same layers."""
        self._last = None
        for path, left in self._targets.items():
            if left:
                raise _other_calls(path, "more")

    def enters_norm(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        if self._last is not None and args and args[0] is self._last[1]:
            self._into_norms.add(self._last[0])

    def dense_hook(self, path: str) -> Any:
        layer = self.layers[path]

        def measure(_: nn.Module, args: Any, output: Tensor) -> None:
            self._last = path, output
            dim = layer.channel_dim(output)
            _check_count(path, output, dim)
            mean, variance = means_and_variances(output, dim)
            if layer.kept is not None:
                kept = layer.kept.to(mean.device)
                mean, variance = mean[kept], variance[kept]
            self._targets[path].append((mean, variance))

        return measure

    def pruned_hook(self, path: str) -> Any:
        layer = self.layers[path]

        def correct(_: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if not self._targets[path]:
                raise _other_calls(path, "less")
            dim = layer.channel_dim(output)
            mean, variance = means_and_variances(output, dim)
            count = output.numel() // output.shape[dim]
            goal_mean, goal_variance = (
                one.to(mean.device) for one in self._targets[path].popleft()
            )
            included = path in self._into_norms and not layer.shifts
            values = torch.cat([goal_mean, goal_variance, mean, variance]).cpu().double() * count
            row = torch.cat([values, values.new_tensor([count, count * included])])
            self.rows[path] = self.rows[path] + row if path in self.rows else row
            if included:
                return None
            shape = [-1 if one == dim else 1 for one in range(output.dim())]
            scale, shift = _correction(goal_mean, goal_variance, mean, variance, layer.shifts)
            wide = output if output.dtype == torch.float64 else output.float()
            new = wide * scale.to(wide).view(shape) + shift.to(wide).view(shape)
            return new.to(output.dtype)

        return correct


def _correction(
    dense_mean: Tensor, dense_variance: Tensor, mean: Tensor, variance: Tensor, shifts: bool
) -> tuple[Tensor, Tensor]:
    """The scale and the shift of each channel."""
    constant = _is_constant(mean, variance) | _is_constant(dense_mean, dense_variance)
    scale = torch.where(constant, 1.0, (dense_variance / variance).sqrt())
    return scale, dense_mean - scale * mean if shifts else torch.zeros_like(scale)


def _is_constant(mean: Tensor, variance: Tensor) -> Tensor:
    """Whether the values of a channel differ by no more than the rounding of float32."""
    return variance <= (8 * torch.finfo(torch.float32).eps * mean).square()


def _write(layers: Mapping[str, RepairableLayer], rows: Mapping[str, Tensor]) -> None:
    if not any(bool(row[-2]) for row in rows.values()):
        raise ValueError("`loader` must yield at least one batch, but it is empty.")
    new: dict[str, dict[str, Tensor]] = {}
    for path, row in rows.items():
        layer = layers[path]
        if not row[-2] or (row[-1] and not layer.shifts):
            continue
        goal_mean, goal_variance, mean, variance = (row[:-2] / row[-2]).chunk(4)
        scale, shift = _correction(goal_mean, goal_variance, mean, variance, layer.shifts)
        new[path] = layer.corrected(scale, shift)
        for name, values in new[path].items():
            if not bool(values.isfinite().all()):
                raise ValueError(
                    f"`model` must have activations whose statistics are finite, but the new "
                    f"`{name}` of `{path or 'the model'}` would be NaN or infinite in "
                    f"{values.dtype}. Check the weights for divergence, or use a wider dtype."
                )
    with torch.no_grad():
        for path, values in new.items():
            for name, value in values.items():
                layers[path].module.get_parameter(name).copy_(value)


def _other_calls(path: str, more: str) -> ValueError:
    return ValueError(
        f"`dense` must call its layers as `model` does, but it calls `{path}` {more} often. Pass "
        f"the model before pruning."
    )


def _check_count(path: str, values: Tensor, channels: int) -> None:
    if values.numel() < 2 * values.shape[channels]:
        raise ValueError(
            f"`loader` must yield batches with more than one value per channel, since one value "
            f"has no variance, got outputs of shape {tuple(values.shape)} of "
            f"`{path or 'the model'}`. Use larger batches."
        )
