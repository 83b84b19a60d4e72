"""Magnitude pruning, with masks that keep removed weights at zero."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, get_args

from torch import Tensor, nn

from drophot._core import order_statistics
from drophot._core.exact_arithmetic import exact
from drophot._core.ratios import check_prune_ratio, num_removed
from drophot._core.user_warnings import warn
from drophot.prune import earlier_masks, layer_sparsity, semi_structured
from drophot.prune.batchnorm import recalibrate_bn
from drophot.prune.compressed_checkpoint import load_compressed, save_compressed
from drophot.prune.layer_sparsity import Scope
from drophot.prune.masks import Masks
from drophot.prune.model_summary import LayerSummary, Summary, summary
from drophot.prune.prunable_weights import check_changeable, check_finite, names_of, prunable
from drophot.prune.semi_structured import to_semi_structured
from drophot.prune.unpruned_weights import warn_of_uncovered

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


def magnitude_prune(
    model: nn.Module,
    ratio: float,
    *,
    scope: Scope = "global",
    min_kept: float = 0.0,
    pattern: str | None = None,
    skip: Iterable[str] = (),
    include: Iterable[str] = (),
) -> Masks:
    r"""Remove a share `ratio` of the weights: set those of the least magnitude to zero, in place.

    `ratio` is the share **removed**, :math:`\theta' = \theta \odot m`. Of `n` weights
    `floor(ratio * n + 0.5)` are removed, exactly. Prunable are the weights of Linear, Bilinear,
    Conv, MultiheadAttention and recurrent layers and of Transformers' `Conv1D`, never biases,
    norms or embeddings. A weight that is shared between layers counts once; an embedding that
    shares its weight with a Linear layer, as in most language models, is pruned with it, unless
    `skip` names one of the two. Matrices in other layers stay dense, as do the weights of layers
    that compute another kernel from them (weight standardisation): if these hold more than 1 % of
    the model's matrix weights, embeddings not counted, a warning names them and their share, and
    `include` prunes them. Ties at the threshold are broken so that the removed weights are spread
    evenly among them.

    Weights that an earlier pruning removed stay removed and count among the weights that are
    removed, so that pruning again only removes more. Other weights that are zero are the first to
    go, but only as many as `ratio` asks for: the rest is not masked, can be trained, and a warning
    gives their number. A layer in which every weight is zero, such as a head that is initialised
    at zero, has no magnitudes to rank: with `"global"` and `"lamp"` all of it is kept, its share
    is taken from the other layers, and a warning names it; with the other scopes and with a
    `pattern` it loses its share, spread evenly.

    Zeroed weights do not make a dense tensor smaller or faster, and an optimiser's next step
    brings them back unless `Masks.hold` keeps them at zero.

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
            [0, 1), rounded up to whole weights: a ranking of all layers can empty one.
        pattern: `"N:M"` keeps the N of largest magnitude, the first of equal ones, of each M
            consecutive weights along the input dimension, such as `"2:4"`, which
            `to_semi_structured` makes faster; `ratio` is then `1 - N/M`, which may be rounded to
            two digits or more. Layers whose inputs M does not divide stay dense and are warned
            about by name.
        skip: Names of modules or parameters to leave dense, as in `model.named_modules()`; a
            module's name includes everything in it.
        include: Names of further parameters to prune, or of modules, whose matrices are then
            pruned: experts kept in 3-D tensors, for example. Biases, norms, embeddings and learned
            positions of such a module are pruned only if their own names are given.

    Returns:
        The masks, `True` where a weight is kept.

    Raises:
        TypeError: If `ratio` or `min_kept` is not a number, or a weight not of plain floats.
        ValueError: If these are out of range or cannot both be met, the layers that are not all
            zero have too few weights, `scope`, `pattern` or a name in `skip` or `include` is
            unknown, nothing is left to prune, `model` is one of TorchScript, or a weight is not
            finite, has no data yet, is sharded over processes, computed by a parametrization or
            made in inference mode. The model is unchanged then.

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
    settings = {"scope": scope, "min_kept": min_kept, "pattern": pattern}
    return pruned(model, ratio, **settings, skip=skip, include=include, late=set())


@exact(in_place=True)
def pruned(
    model: nn.Module,
    ratio: float,
    *,
    scope: Scope,
    min_kept: float,
    skip: Iterable[str],
    include: Iterable[str],
    late: set[str],
    pattern: str | None = None,
) -> Masks:
    """What `magnitude_prune` does, for one pruning of several.

    Args:
        model: As in `magnitude_prune`, like all arguments but one.
        ratio: The share removed.
        scope: How it is divided.
        min_kept: What stays of each layer.
        skip: What stays dense.
        include: What is pruned in addition to what is known to be prunable.
        late: The layers that were all zero at an earlier pruning. Those that are now are added.
            With `"global"` they lose no more than `ratio` of their weights: these have grown for
            less time than those that they are compared with.
        pattern: `"N:M"`, if any.

    Returns:
        The masks.

    Raises:
        TypeError: As `magnitude_prune`.
        ValueError: As `magnitude_prune`.
    """
    ratio = check_prune_ratio("ratio", ratio)
    check_scope("scope", scope)
    min_kept = check_prune_ratio("min_kept", min_kept)
    if min_kept and scope not in ("global", "lamp"):
        raise ValueError(
            f'`min_kept` needs a ranking of all layers, scope="global" or "lamp". Found '
            f"scope={scope!r}, which already gives each layer its share: leave it out."
        )
    if pattern is not None and (scope != "global" or min_kept):
        raise ValueError(
            f"`pattern` cannot be combined with other options, since each group of weights loses "
            f"the same number. Found scope={scope!r} and min_kept={min_kept}: leave them out."
        )
    kept, of = (0, 0) if pattern is None else semi_structured.parse(pattern, ratio)
    skip = names_of("skip", skip)
    weights = prunable(model, skip, include)
    for name, weight in weights.items():
        check_changeable(name, weight)
    warn_of_uncovered(model, weights, skip)
    filled = {name for name, weight in weights.items() if check_finite(name, weight)}
    older = earlier_masks.masks_of(model, weights)
    blank = {n for n in weights if n not in filled and (n not in older or bool(older[n].any()))}
    late |= blank
    if pattern is None:
        out = blank if filled and ratio and scope in ("global", "lamp") else set()
        masks = _cut(weights, older, out, late - blank, ratio, scope, min_kept)
    else:
        dims = semi_structured.fitting(model, weights, of, pattern)
        weights = {name: weights[name] for name in dims}
        masks = {
            name: semi_structured.cut(weights[name], kept, of, dim, older.get(name))
            for name, dim in dims.items()
        }
        _warn_of_zeros(weights, masks, ratio)
        asked = sum(mask.numel() // of * (of - kept) for mask in masks.values())
        _warn_of_older(masks, asked, f'`pattern="{pattern}"`')
    found = Masks(model, masks)
    earlier_masks.remember(model, found)
    return found


def _cut(
    weights: Mapping[str, nn.Parameter],
    older: Mapping[str, Tensor],
    blank: Collection[str],
    late: Collection[str],
    ratio: float,
    scope: Scope,
    min_kept: float,
) -> dict[str, Tensor]:
    """Set what goes to zero; the masks, by name."""
    groups = layer_sparsity.groups(weights, older, ratio, scope, min_kept, blank, late)
    edges = [
        order_statistics.magnitude_threshold(
            [weights[n] for n in names], count, [older.get(n) for n in names]
        )
        for names, count in groups
    ]
    masks: dict[str, Tensor] = {}
    unmasked: list[str] = []
    for (names, _), edge in zip(groups, edges, strict=True):
        cut = order_statistics.pruner(edge)
        masks |= {name: cut(weights[name], older.get(name)) for name in names}
        if edge.key <= 0:  # else all zeros are below it
            unmasked += [name for name in names if name not in blank]
    _warn_of_blank(weights, blank, ratio)
    _warn_of_zeros({name: weights[name] for name in unmasked}, masks, ratio)
    if older:
        sizes = [weight.numel() for weight in weights.values()]
        asked = sum(num_removed(n, ratio) for n in (sizes if scope == "layer" else [sum(sizes)]))
        _warn_of_older(masks, asked, f"`ratio={ratio:g}` with scope={scope!r}")
    return {name: masks[name] for name in weights}


def _warn_of_blank(weights: Mapping[str, Tensor], blank: Collection[str], ratio: float) -> None:
    if blank:
        count = sum(weights[name].numel() for name in blank)
        names = [f"`{name}`" for name in weights if name in blank]
        warn(
            f"`ratio={ratio:g}` is taken from the other layers. Found nothing but zeros in "
            f"{', '.join(names[:3])}{', …' * (len(names) > 3)} ({count:,} weights). No earlier "
            f"pruning removed them, so there is nothing to rank: all of them are kept and can be "
            f"trained. Prune again when they have trained, or name them in `skip`; if they were "
            f"pruned, call Masks.from_zeros(model).apply() first, which keeps all zeros."
        )


def _warn_of_zeros(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], ratio: float
) -> None:
    zeros = {
        name: int(masks[name].count_nonzero()) - int(weight.count_nonzero())
        for name, weight in weights.items()
    }
    if more := sum(zeros.values()):
        names = [f"`{name}`" for name, count in zeros.items() if count]
        warn(
            f"`ratio={ratio:g}` removes fewer weights than are zero already. Found {more:,} more "
            f"zeros in {', '.join(names[:3])}{', …' * (len(names) > 3)}: they are not masked and "
            f"can be trained. To mask all zeros, use Masks.from_zeros(model)."
        )


def _warn_of_older(masks: Mapping[str, Tensor], asked: int, what: str) -> None:
    removed = sum(int((~mask).count_nonzero()) for mask in masks.values())
    if removed > asked:
        warn(
            f"{what} removes {asked:,} weights. Found {removed:,} that are removed now, as weights "
            f"that an earlier pruning removed do not come back; to prune less, load the weights "
            f"from before it."
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
