"""The interface of importances: functions that rank weights or channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from drophot._core.signatures import signature_error, without_partials


class Importance(Protocol):
    """A function that gives each weight an importance; the least important weights are removed.

    Pass one to `magnitude_prune`, `Schedule`, `prune_channels` or `DropHot` as `importance=`, and
    several to `Grid` as `importances=`. Each pruning calls it once for each prunable parameter,
    before anything is changed, without gradients and autocast. It gets the parameter itself, so
    that it can read `weight.grad`, and must not change it.

    Importances are compared with their signs, in the dtype that is returned; if dtypes differ
    between layers, in the one that these promote to. Importances of weights that an earlier
    pruning removed are ignored, even if they are NaN.

    Args:
        name: The name of the parameter, as in `model.named_parameters()`.
        weight: The parameter, of any shape.

    Returns:
        Finite floats of 16 bits or more, of the weight's shape, on any device. A higher one is
        kept longer. For `prune_channels`, none is negative, and one value per output channel,
        `(C_out,)`, is enough.

    Example:
        >>> import torch
        >>> from drophot import magnitude_prune
        >>> def saliency(name: str, weight: Tensor) -> Tensor:
        ...     return (weight * weight.grad).abs()
        >>> model = nn.Linear(3, 1)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, -2.0, 1.0]]))
        >>> model(torch.tensor([[0.0, 1.0, 1.0]])).sum().backward()
        >>> magnitude_prune(model, 1 / 3, importance=saliency)["weight"]
        tensor([[False,  True,  True]])
    """

    def __call__(self, name: str, weight: nn.Parameter, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class FromBatches:
    """An importance that a run computes from its network and its training set before it prunes.

    `Taylor`, `Fisher` and `Wanda` are computed from the model that is pruned. A run trains that
    model itself, so `DropHot` and `Grid` take the class in this wrapper. Outside of a run, compute
    the importance yourself.

    Args:
        make: A function of the model and its batches that returns an importance: a class such as
            `Taylor`, a `functools.partial` of one, or your own function. The batches are tuples of
            inputs, targets and indices, and hold each sample of the training set once, in random
            order. A last batch of a single sample is left out, unless `batch_size` is 1, because
            BatchNorm may not take it. The function may stop early. It is also tried on one batch
            and an untrained model when the run is created. A worker process needs a function that
            can be pickled.

    Raises:
        TypeError: If `make` cannot be called with a model and batches.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from torch.utils.data import TensorDataset
        >>> from drophot import DropHot
        >>> from drophot.models import fcnet
        >>> from drophot.prune.importances import FromBatches, Taylor
        >>> data = TensorDataset(torch.eye(8), torch.arange(8) % 2)
        >>> network = partial(fcnet, in_features=8, hidden=4, num_classes=2)
        >>> settings = dict(data_ratio=0.5, mode="random", prune_ratio=0.5)
        >>> run = DropHot(network, data, data, **settings, importance=FromBatches(Taylor))
        >>> run.run().importance
        'Taylor'
    """

    make: Callable[[nn.Module, Iterator[tuple[Tensor, ...]]], Importance]

    def __post_init__(self) -> None:
        if wrong := signature_error(self.make, None, None):
            raise TypeError(
                f"`make` must take two arguments, a model and batches, got {wrong}. Pass a class "
                f"such as Taylor, or a function that returns an importance."
            )

    @property
    def name(self) -> str:
        """The name in records, files and tables: that of the class or function."""
        make = without_partials(self.make)
        return getattr(make, "__qualname__", type(make).__qualname__)


RunImportance = Importance | FromBatches | None
"""What a run takes as importance."""


def check_run_importance(name: str, value: object) -> object:
    """Check an importance of a run, which may compute it from batches."""
    return value if isinstance(value, FromBatches) else check_importance(name, value)


def check_importance(name: str, value: object) -> object:
    if isinstance(value, FromBatches):
        raise TypeError(
            f"`{name}` must be computed before this call, got FromBatches({value.name}), which is "
            f"for `DropHot` and `Grid`. Pass `{value.name}(model, batches)`."
        )
    if value is None:
        return value
    if isinstance(value, type) or not callable(value):
        got = f"the class {value.__qualname__}" if isinstance(value, type) else repr(value)
        raise TypeError(
            f"`{name}` must be a function of a parameter's name and the parameter, got {got}. To "
            f"rank by magnitude, leave it out."
        )
    if wrong := signature_error(value, "weight", None):
        raise TypeError(
            f"`{name}` must take two arguments, a parameter's name and the parameter, got {wrong}."
        )
    return value


def importance_name(importance: RunImportance) -> str:
    if importance is None:
        return "magnitude"
    if isinstance(importance, FromBatches):
        return importance.name
    function = without_partials(importance)
    return getattr(function, "__qualname__", type(function).__qualname__)
