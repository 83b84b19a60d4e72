"""Magnitude pruning: set the smallest weights to zero, or the least important ones."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor, nn

from drophot._core.exact_arithmetic import exact
from drophot._core.importance import Importance, check_importance
from drophot._core.ratios import check_prune_ratio, num_removed
from drophot._core.user_warnings import warn
from drophot.prune import earlier_masks, prunable_weights, semi_structured
from drophot.prune.adapted_models import check_no_adapters
from drophot.prune.importance import Ranking, rank_by
from drophot.prune.layer_sparsity import Scope, removal_groups
from drophot.prune.masks import Masks
from drophot.prune.prunable_weights import (
    check_changeable,
    check_finite,
    names_of,
    prunable,
)
from drophot.prune.removal import Removal, remove_by_pattern, remove_by_rank
from drophot.prune.unheld_masks import shortened
from drophot.prune.unpruned_weights import warn_of_uncovered


def magnitude_prune(
    model: nn.Module,
    ratio: float,
    *,
    scope: Scope = "global",
    min_kept: float = 0.0,
    pattern: str | None = None,
    skip: Iterable[str] = (),
    include: Iterable[str] = (),
    importance: Importance | None = None,
) -> Masks:
    r"""Remove a share `ratio` of the weights: set the smallest to zero, in place.

    `ratio` is the share **removed**, :math:`\theta' = \theta \odot m`. Of `n` weights, exactly
    `floor(ratio * n + 0.5)` are removed. Prunable are the weights of Linear, Bilinear, Conv,
    MultiheadAttention and recurrent layers and of Transformers' `Conv1D`, never biases, norms or
    embeddings. A weight that is shared between layers counts once; an embedding that shares its
    weight with a Linear layer, as in most language models, is pruned with it, unless `skip` names
    one of the two. Matrices in other layers stay dense, as do the weights of layers that compute
    another kernel from them (weight standardization). If these hold more than 1 % of the model's
    matrix weights, embeddings not counted, a warning names them and their share, and `include`
    prunes them. Ties at the threshold are broken so that the removed weights are spread evenly
    among them.

    Weights that an earlier pruning removed stay removed and count among the removed weights, so
    pruning again only removes more. Other weights that are zero are removed first, but only as
    many as `ratio` asks for; the rest are not masked and can be trained, and a warning gives their
    number. A layer in which every weight is zero, such as a head that is initialized at zero,
    cannot be ranked: with `"global"` and `"lamp"` all of it is kept, its share is taken from the
    other layers, and a warning names it. With the other scopes and with a `pattern` it loses its
    share, spread evenly.

    With `importance`, the weights of lowest importance are removed instead of those of smallest
    magnitude; everything else stays the same. Zeros are then ranked by their importance like other
    weights, and a layer is left out only if its importances are all zero too. The importances of
    all layers are in memory at once, one number per weight in the dtype that the function returns.

    Zeroed weights do not make a dense tensor smaller or faster, and the optimizer's next step
    changes them again unless `Masks.hold` keeps them at zero.

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
        scope: How the share is divided among the layers. `"global"` ranks all weights together.
            `"layer"` removes the share from each weight tensor, uniformly. `"erk"` (Erdős–Rényi
            kernel) leaves each layer a density proportional to the sum of its dimensions over
            their product, so that small layers lose less. `"lamp"` ranks
            :math:`w_i^2 / \sum_{|w_j| \ge |w_i|} w_j^2`, with the sum over the layer, among all
            layers, so that the last weights of a layer are removed last. The total is exact, and
            with `"layer"` each layer's count. Within a layer the smallest weights are removed.
        min_kept: With `"global"` and `"lamp"`, the minimum share of each layer that is kept, in
            [0, 1), rounded up to whole weights. Without it, a ranking of all layers can empty one.
        pattern: `"N:M"` keeps the N largest of each M consecutive weights along the input
            dimension, the first of equal ones. `to_semi_structured` makes `"2:4"` faster. `ratio`
            must be `1 - N/M`, which may be rounded to two digits or more. Layers whose number of
            inputs M does not divide stay dense, and a warning names them.
        skip: Names of modules or parameters to leave dense, as in `model.named_modules()`; a
            module's name includes everything in it.
        include: Names of further parameters to prune, or of modules, whose matrices are then
            pruned: experts kept in 3-D tensors, for example. Biases, norms, embeddings and learned
            positions of such a module are pruned only if their own names are given.
        importance: A function `fn(name, weight)` that returns a tensor of the weight's shape, in
            which higher values are kept: see `drophot.prune.Importance`. `None` ranks by magnitude,
            without a copy of the weights. With `"lamp"`, importances must not be negative, and take
            the place of :math:`|w_i|` in the formula.

    Returns:
        The masks, `True` where a weight is kept.

    Raises:
        TypeError: If `ratio` or `min_kept` is not a number, a weight is not a tensor of plain
            floats, or `importance` is not callable or does not return a tensor of floats.
        ValueError: If these are out of range or cannot both be met, the layers that are not all
            zero have too few weights, `scope`, `pattern` or a name in `skip` or `include` is
            unknown, nothing is left to prune, `model` is a result of TorchScript or torch.export or
            has adapters, such as LoRA's, that `skip` does not name, or a weight is not finite, has
            no data yet, is sharded over processes, is computed by a parametrization, was made in
            inference mode or is an expanded or negated view. Also if `importance` returns another
            shape, NaN, infinity, or, with `"lamp"`, a negative number. The model is unchanged then.

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
    options = pruning_options(
        scope=scope,
        min_kept=min_kept,
        pattern=pattern,
        skip=skip,
        include=include,
        importance=importance,
    )
    masks, _ = prune_to_ratio(model, check_prune_ratio("ratio", ratio), options)
    return masks


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningOptions:
    """The checked options of `magnitude_prune`."""

    scope: Scope
    min_kept: float
    pattern: str | None
    skip: tuple[str, ...]
    include: tuple[str, ...]
    importance: Importance | None


def pruning_options(
    *,
    scope: Scope,
    min_kept: float,
    pattern: str | None = None,
    skip: Iterable[str],
    include: Iterable[str],
    importance: Importance | None,
) -> PruningOptions:
    check_scope("scope", scope)
    min_kept = check_prune_ratio("min_kept", min_kept)
    if min_kept and scope not in ("global", "lamp"):
        raise ValueError(
            f'`min_kept` needs a ranking of all layers, scope="global" or "lamp", got '
            f"min_kept={min_kept} with scope={scope!r}, which gives each layer its share. Leave "
            f"`min_kept` out."
        )
    if pattern is not None and (scope != "global" or min_kept):
        raise ValueError(
            f"`pattern` cannot be combined with `scope` or `min_kept`, since each group of weights "
            f"loses the same number, got scope={scope!r} and min_kept={min_kept}. Leave them out."
        )
    check_importance("importance", importance)
    return PruningOptions(
        scope=scope,
        min_kept=min_kept,
        pattern=pattern,
        skip=names_of("skip", skip),
        include=names_of("include", include),
        importance=importance,
    )


@exact(in_place=True)
def prune_to_ratio(
    model: nn.Module, ratio: float, options: PruningOptions, formerly_zero: Collection[str] = ()
) -> tuple[Masks, set[str]]:
    """Prune once, perhaps after earlier prunings; the masks, and the layers that are all zero.

    `formerly_zero` names the layers that were all zero at an earlier pruning. Once they have other
    weights, "global" removes no more than the share `ratio` of them, because their weights have
    grown for less time than those that they are compared with.
    """
    scope, pattern = options.scope, options.pattern
    n, m = (0, 0) if pattern is None else semi_structured.parse_pattern(pattern, ratio)
    prunable_weights.check_module("model", model)
    check_no_adapters(model, prunable_weights.left_out(model, options.skip))
    weights = prunable(model, options.skip, options.include)
    for name, weight in weights.items():
        check_changeable(name, weight)
    warn_of_uncovered(model, weights, options.skip)
    nonzero = check_finite(weights)
    earlier = earlier_masks.masks_of(model, weights)
    if options.importance is None:
        ranking = Ranking(values=weights, earlier=earlier)
    else:
        ranking = rank_by(options.importance, weights, earlier, scope=scope)
        nonzero |= ranking.nonzero_layers()
    zero_layers = {
        name
        for name in weights
        if name not in nonzero and (name not in earlier or bool(earlier[name].any()))
    }
    if pattern is None:
        left_out = zero_layers if nonzero and ratio and scope in ("global", "lamp") else set()
        masks = _prune_by_ranking(
            weights, ranking, ratio, options, left_out, {*formerly_zero} - zero_layers
        )
    else:
        dims = semi_structured.input_dimensions(model, weights, m, pattern)
        removal = remove_by_pattern(weights, ranking, n, m, dims)
        masks = removal.masks
        _warn_of_kept_zeros(removal.kept_zeros, ratio)
        target = sum(mask.numel() // m * (m - n) for mask in masks.values())
        _warn_of_more_removed(removal, target, f'`pattern="{pattern}"`')
    found = Masks(model, masks)
    earlier_masks.remember(model, found)
    return found, zero_layers


def _prune_by_ranking(
    weights: Mapping[str, nn.Parameter],
    ranking: Ranking,
    ratio: float,
    options: PruningOptions,
    left_out: Collection[str],
    formerly_zero: Collection[str],
) -> dict[str, Tensor]:
    """Set the lowest-ranked weights to zero; the masks, by name."""
    groups = removal_groups(
        ranking, ratio, options.scope, options.min_kept, left_out, formerly_zero
    )
    removal = remove_by_rank(weights, ranking, groups)
    _warn_of_zero_layers(weights, left_out, ratio)
    kept_zeros = {n: count for n, count in removal.kept_zeros.items() if n not in left_out}
    _warn_of_kept_zeros(kept_zeros, ratio)
    if ranking.earlier:
        sizes = [weight.numel() for weight in weights.values()]
        parts = sizes if options.scope == "layer" else [sum(sizes)]
        target = sum(num_removed(size, ratio) for size in parts)
        _warn_of_more_removed(removal, target, f"`ratio={ratio:g}` with scope={options.scope!r}")
    return {name: removal.masks[name] for name in weights}


def _warn_of_zero_layers(
    weights: Mapping[str, Tensor], zero_layers: Collection[str], ratio: float
) -> None:
    if zero_layers:
        names = [name for name in weights if name in zero_layers]
        count = sum(weights[name].numel() for name in names)
        warn(
            f"`ratio={ratio:g}` is taken from the other layers, since all weights of "
            f"{shortened(names)} ({count:,} weights) are zero and cannot be ranked. No earlier "
            f"pruning removed them, so all of them are kept and can be trained. Prune again when "
            f"they have been trained, or name them in `skip`. If they were pruned, call "
            f"Masks.from_zeros(model).apply() first, which keeps all zeros."
        )


def _warn_of_kept_zeros(zeros: Mapping[str, int], ratio: float) -> None:
    if count := sum(zeros.values()):
        names = [name for name, number in zeros.items() if number]
        warn(
            f"`ratio={ratio:g}` leaves {count:,} weights unmasked that are zero, in "
            f"{shortened(names)}: they can be trained. To mask all zeros, use "
            f"Masks.from_zeros(model)."
        )


def _warn_of_more_removed(removal: Removal, target: int, setting: str) -> None:
    removed = removal.num_removed
    if removed is not None and removed > target:
        warn(
            f"{setting} asks for {target:,} removed weights, but {removed:,} are removed, because "
            f"weights that an earlier pruning removed do not come back. To prune less, load the "
            f"weights from before it."
        )


def check_scope(name: str, scope: Any) -> None:
    if scope not in get_args(Scope):
        choices = ", ".join(f'"{choice}"' for choice in get_args(Scope))
        raise ValueError(f"`{name}` must be one of {choices}, got {scope!r}.")
