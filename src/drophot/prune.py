"""Magnitude pruning, and masks that hold."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, get_args

from torch import nn

from drophot import _budgets, _pattern, _radix
from drophot._batchnorm import recalibrate_bn
from drophot._budgets import Scope
from drophot._compressed import load_compressed, save_compressed
from drophot._exact import exact
from drophot._masks import Masks
from drophot._pattern import to_semi_structured
from drophot._summary import LayerSummary, Summary, summary
from drophot._weights import check_finite, prunable

__all__ = [
    "LayerSummary",
    "Masks",
    "Summary",
    "load_compressed",
    "magnitude_prune",
    "recalibrate_bn",
    "save_compressed",
    "summary",
    "to_semi_structured",
]


@exact(in_place=True)
def magnitude_prune(
    model: nn.Module,
    ratio: float,
    *,
    scope: Scope = "global",
    min_kept: float = 0.0,
    pattern: str | None = None,
    skip: Collection[str] = (),
) -> Masks:
    r"""Remove a share `ratio` of the weights: set those of the least magnitude to zero, in place.

    `ratio` is the share **removed**, :math:`\theta' = \theta \odot m`. Of `n` weights
    `floor(ratio * n + 0.5)` are removed, exactly. Prunable are the weights of Linear and Conv
    layers, the projections of MultiheadAttention included, never biases, norms or embeddings; a
    weight shared between layers counts once. Where more weights of equal magnitude stand at the
    edge than are to go, those that go are spread evenly over them. Weights that are zero already
    are the first to go, and all of them belong to the masks: pruning again to a higher ratio
    removes more and brings nothing back.

    Zeros in a dense tensor make nothing smaller or faster by themselves, and an optimiser's next
    step brings them back unless `Masks.hold` keeps them.

    References:
        Gupta et al., Drop it Like it's Hot: Network Pruning with Data Selection, section 4.4.
        Han et al., Learning both Weights and Connections for Efficient Neural Networks, NeurIPS
        2015, https://arxiv.org/abs/1506.02626. ERK: Evci et al., Rigging the Lottery, ICML 2020,
        https://arxiv.org/abs/1911.11134. LAMP: Lee et al., Layer-adaptive Sparsity for the
        Magnitude-based Pruning, ICLR 2021, https://arxiv.org/abs/2010.07611. N:M: Mishra et al.,
        Accelerating Sparse Deep Neural Networks, 2021, https://arxiv.org/abs/2104.08378.

    Args:
        model: Any module, on any device.
        ratio: The share removed, in [0, 1).
        scope: How the share is divided among the layers. `"global"` ranks all weights together;
            `"layer"` removes the share from each weight tensor, uniformly; `"erk"` leaves each
            layer a density in proportion to the sum of its dimensions over their product
            (Erdős–Rényi kernel), so that small layers lose less; `"lamp"` ranks
            :math:`w_i^2 / \sum_{|w_j| \ge |w_i|} w_j^2`, the sum within the layer, over all
            layers, so that the last weights of a layer are the last to go. The total is exact,
            with `"layer"` each layer's; within a layer the smallest magnitudes go.
        min_kept: With `"global"` and `"lamp"`, the share of each layer that stays at least, in
            [0, 1): a ranking of all layers can empty one.
        pattern: `"N:M"` keeps the N of largest magnitude, the first of equal ones, of each M
            consecutive weights along the input dimension, such as `"2:4"`, which
            `to_semi_structured` makes faster; `ratio` is then `1 - N/M`. Layers whose inputs M
            does not divide stay dense and are warned about by name.
        skip: Names of modules or parameters to leave dense, as in `model.named_modules()`; a
            module's name stands for everything in it.

    Returns:
        The masks: what is kept, weight by weight.

    Raises:
        TypeError: If `ratio` or `min_kept` is not a number, or a weight not of plain floats.
        ValueError: If these are out of range or cannot both be met, `scope`, `pattern` or a name in
            `skip` is unknown, nothing is left to prune, or a weight is not finite, has no data
            yet, is sharded over processes or computed by a parametrization. The model is untouched
            then.

    Example:
        >>> import torch
        >>> model = nn.Linear(4, 1)
        >>> _ = model.weight.data.copy_(torch.tensor([[0.1, -3.0, 0.2, 2.0]]))
        >>> masks = magnitude_prune(model, 0.5)
        >>> model.weight.detach()
        tensor([[ 0., -3.,  0.,  2.]])
        >>> masks["weight"]
        tensor([[False,  True, False,  True]])
    """
    check_ratio("ratio", ratio)
    check_scope("scope", scope)
    check_ratio("min_kept", min_kept)
    if min_kept and scope not in ("global", "lamp"):
        raise ValueError(
            f'`min_kept` should go with a ranking of all layers, "global" or "lamp". Found '
            f"scope={scope!r}, which gives each layer its share already; leave it out."
        )
    if pattern is not None and (scope != "global" or min_kept):
        raise ValueError(
            f"`pattern` should stand alone: each group of weights loses the same. Found "
            f"scope={scope!r} and min_kept={min_kept}; leave them out."
        )
    kept, of = (0, 0) if pattern is None else _pattern.parse(pattern, ratio)
    weights = prunable(model, skip)
    for name, weight in weights.items():
        check_finite(name, weight)
    masks = {}
    if pattern is not None:
        for name, dim in _pattern.fitting(model, weights, of, pattern).items():
            masks[name] = _pattern.cut(weights[name], kept, of, dim)
        return Masks(model, masks)
    groups = _budgets.groups(weights, ratio, scope, min_kept)
    edges = [
        _radix.edge([weights[name] for name in group], count) for group, count in groups if group
    ]
    for (group, _), edge in zip([g for g in groups if g[0]], edges, strict=True):
        cut = _radix.cutter(edge)
        masks |= {name: cut(weights[name]) for name in group}
    return Masks(model, {name: masks[name] for name in weights})


def check_ratio(name: str, ratio: Any) -> None:
    """Refuse a ratio that is no share removed.

    Args:
        name: What the caller calls it.
        ratio: The value.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not in [0, 1).
    """
    try:
        if isinstance(ratio, str | bytes | bool):  # float() takes them too
            raise TypeError
        inside = 0 <= float(ratio) < 1
    except (TypeError, ValueError):
        raise TypeError(
            f"`{name}` should be a number in [0, 1). Found {type(ratio).__name__}."
        ) from None
    if not inside:
        meant = float(ratio) if 2 <= ratio < 100 else 80.0
        raise ValueError(
            f"`{name}` should be a share of the weights, in [0, 1). Found {ratio}; for {meant:g} % "
            f"give {meant / 100:g}."
        )


def check_scope(name: str, scope: Any) -> None:
    """Refuse an unknown scope.

    Args:
        name: What the caller calls it.
        scope: The value.

    Raises:
        ValueError: If it is unknown.
    """
    if scope not in get_args(Scope):
        choices = ", ".join(f'"{choice}"' for choice in get_args(Scope))
        raise ValueError(f"`{name}` should be one of {choices}. Found {scope!r}.")
