"""Magnitude pruning, and masks that hold."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from math import floor
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from drophot import _radix
from drophot._summary import LayerSummary, Summary, summary

__all__ = ["LayerSummary", "Masks", "Summary", "magnitude_prune", "summary"]

Scope = Literal["global", "layer"]

# Where the weights of a layer's linear maps are. An attention layer keeps those of its input
# projections in parameters of its own; its output projection is a Linear.
_PRUNABLE: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight",),
    _ConvNd: ("weight",),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}


def magnitude_prune(
    model: nn.Module, ratio: float, *, scope: Scope = "global", skip: Collection[str] = ()
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
        2015, https://arxiv.org/abs/1506.02626.

    Args:
        model: Any module, on any device.
        ratio: The share removed, in [0, 1).
        scope: `"global"` ranks all weights together; `"layer"` removes the share from each weight
            tensor.
        skip: Names of modules or parameters to leave dense, as in `model.named_modules()`; a
            module's name stands for everything in it.

    Returns:
        The masks: what is kept, weight by weight.

    Raises:
        TypeError: If `ratio` is not a number, or a weight not of floats.
        ValueError: If `ratio` is not in [0, 1), `scope` or a name in `skip` is unknown, nothing
            is left to prune, or a weight is not finite, has no data yet or is computed by a
            parametrization. The model is untouched then.

    Example:
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
    weights = _prunable(model, skip)
    groups = [list(weights)] if scope == "global" else [[name] for name in weights]
    for name, weight in weights.items():
        _check_finite(name, weight)
    edges = []
    for group in groups:
        total = sum(weights[name].numel() for name in group)
        remove = floor(ratio * total + 0.5)
        edges.append(_radix.edge([weights[name] for name in group], remove))
    masks = {}
    for group, edge in zip(groups, edges, strict=True):
        cut = _radix.cutter(edge)
        masks |= {name: cut(weights[name]) for name in group}
    return Masks(weights, masks)


class Masks(Mapping[str, Tensor]):
    """What pruning kept: a bool tensor for each pruned parameter, `True` where a weight is kept.

    Made by `magnitude_prune`, or by `Masks.from_zeros` from a model that holds its zeros already.
    A mapping from parameter name to mask, in the model's order. The model itself is not touched
    beyond its zeros: no hooks, no buffers, no renamed keys.

    Example:
        >>> model = nn.Linear(8, 8)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> masks = magnitude_prune(model, 0.75)
        >>> with masks.hold(optimizer):
        ...     model(torch.ones(1, 8)).sum().backward()
        ...     optimizer.step()
        >>> int((model.weight != 0).sum())
        16
        >>> masks
        Masks(1 tensor, 48 of 64 weights removed, sparsity 0.7500)
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        self._weights = dict(weights)
        self._masks = dict(masks)

    @classmethod
    def from_zeros(cls, model: nn.Module, *, skip: Collection[str] = ()) -> Masks:
        """The masks of a model that is pruned already: what is zero is removed.

        Args:
            model: Any module; a dense one gives masks that keep everything.
            skip: Names of modules or parameters to leave out, as in `magnitude_prune`.

        Returns:
            The masks.

        Example:
            >>> masks = magnitude_prune(model := nn.Linear(8, 8), 0.5)
            >>> Masks.from_zeros(model).sparsity
            0.5
        """
        weights = _prunable(model, skip)
        return cls(weights, {name: weight.detach() != 0 for name, weight in weights.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    @property
    def sparsity(self) -> float:
        """The share of the masked parameters' weights that the masks remove, in [0, 1]."""
        removed, total = self._count()
        return removed / total

    def apply(self) -> None:
        """Set the removed weights to zero, now."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.masked_fill_(~self._masks[name].to(weight.device), 0)

    def hold(self, optimizer: Optimizer) -> RemovableHandle:
        """Keep the removed weights at zero through every step of an optimiser.

        After each step they are set to zero again, so that neither gradients nor momentum nor
        weight decay, nor state from dense training, bring them back. While held, a copy of the
        masks in the weights' dtype makes that one fused multiplication.

        Args:
            optimizer: The optimiser that trains the model.

        Returns:
            A handle: `handle.remove()` lifts the masks, and so does leaving `with handle:`.

        Raises:
            TypeError: If `optimizer` is not a torch optimiser.
            ValueError: If it trains none of the masked parameters.
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"`optimizer` should be a torch.optim.Optimizer. Found {type(optimizer).__name__}."
            )
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        names = [name for name, weight in self._weights.items() if id(weight) in trained]
        if not names:
            raise ValueError(
                "`optimizer` should train the model that was pruned. Found none of its pruned "
                "weights in it; prune the model whose parameters the optimiser was given, not a "
                "copy."
            )
        self.apply()
        weights: list[Tensor] = [self._weights[name] for name in names]
        masks: list[Tensor] = []
        factors: list[Tensor] = []

        def zero(*_: Any) -> None:
            current = [self._masks[name] for name in names]
            if not _same(current, masks) or factors[0].device != weights[0].device:
                masks[:] = current  # loaded anew, or the model has moved
                factors[:] = [
                    torch.empty_like(weight).copy_(mask)
                    for weight, mask in zip(weights, masks, strict=True)
                ]
            with torch.no_grad():
                torch._foreach_mul_(weights, factors)  # pyright: ignore[reportPrivateImportUsage]

        return optimizer.register_step_post_hook(zero)

    def state_dict(self) -> dict[str, Tensor]:
        """The masks, by parameter name, for `torch.save`.

        Returns:
            Copies of the bool tensors.
        """
        return {name: mask.clone() for name, mask in self._masks.items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over saved masks and set the weights that they remove to zero.

        Args:
            state_dict: What `state_dict` gave for the same architecture.

        Raises:
            ValueError: If names, shapes or dtypes are not this model's. Nothing is changed then.
        """
        if state_dict.keys() != self._masks.keys():
            strange = sorted(state_dict.keys() ^ self._masks.keys())
            raise ValueError(
                f"`state_dict` should hold masks for {sorted(self._masks)}. Found a difference "
                f"in {strange}; it belongs to another model."
            )
        for name, mask in state_dict.items():
            mine = self._masks[name]
            if mask.dtype != torch.bool or mask.shape != mine.shape:
                raise ValueError(
                    f'`state_dict["{name}"]` should be a bool tensor of shape '
                    f"{tuple(mine.shape)}. Found {mask.dtype}, {tuple(mask.shape)}."
                )
        for name, mask in state_dict.items():
            self._masks[name] = mask.to(self._masks[name].device, copy=True)
        self.apply()

    def __repr__(self) -> str:
        removed, total = self._count()
        plural = "tensor" if len(self) == 1 else "tensors"
        return (
            f"Masks({len(self)} {plural}, {removed:,} of {total:,} weights removed, "
            f"sparsity {self.sparsity:.4f})"
        )

    def _count(self) -> tuple[int, int]:
        total = sum(mask.numel() for mask in self._masks.values())
        return total - sum(int(mask.sum()) for mask in self._masks.values()), total


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
        inside = 0 <= float(ratio) < 1
    except (TypeError, ValueError):
        raise TypeError(
            f"`{name}` should be a number in [0, 1). Found {type(ratio).__name__}."
        ) from None
    if not inside:
        raise ValueError(
            f"`{name}` should be the share of weights removed, in [0, 1). Found {ratio}; to "
            f"remove 80 % give 0.8."
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
        raise ValueError(f'`{name}` should be "global" or "layer". Found {scope!r}.')


def _prunable(model: nn.Module, skip: Collection[str]) -> dict[str, nn.Parameter]:
    """The weights that pruning is about, by name, shared ones once."""
    left_out = _left_out(model, skip)
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        names = [
            name for kind, names in _PRUNABLE.items() if isinstance(module, kind) for name in names
        ]
        for attribute in names:
            name = f"{path}.{attribute}" if path else attribute
            if attribute not in module._parameters:
                if path in left_out:
                    continue
                raise ValueError(
                    f"`model` should have plain parameters. Found `{name}` computed by a "
                    f"parametrization or an older pruning hook; remove that first "
                    f"(torch.nn.utils.parametrize.remove_parametrizations, "
                    f"torch.nn.utils.prune.remove), or give skip=({path!r},)."
                )
            weight = module._parameters[attribute]
            if weight is None or id(weight) in left_out or id(weight) in seen:
                continue
            _check_weight(name, weight)
            if weight.numel() == 0:
                continue
            seen.add(id(weight))
            found[name] = weight
    if not found:
        raise ValueError(
            f"`model` should have weights to prune, in Linear, Conv or MultiheadAttention layers. "
            f"Found none in {type(model).__name__}"
            f"{' besides those in `skip`' if skip else ''}; prune the module that holds them."
        )
    return found


def _left_out(model: nn.Module, skip: Collection[str]) -> set[int | str]:
    """The parameters (by identity) and the modules (by path) that `skip` names."""
    if isinstance(skip, str):
        raise TypeError(
            f"`skip` should be a collection of names. Found {skip!r}; give ({skip!r},)."
        )
    modules = {path for path, _ in model.named_modules(remove_duplicate=False) if path}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    known = modules | parameters.keys()
    for name in skip:
        if name not in known:
            near = get_close_matches(str(name), known, n=3)
            raise ValueError(
                f"`skip` should name modules or parameters of the model. Found {name!r}"
                f"{', near to ' + ', '.join(map(repr, near)) if near else ''}; see "
                f"model.named_modules()."
            )

    def named(path: str) -> bool:
        return any(path == name or path.startswith(f"{name}.") for name in skip)

    return {id(parameter) for path, parameter in parameters.items() if named(path)} | {
        path for path in modules if named(path)
    }


def _check_weight(name: str, weight: nn.Parameter) -> None:
    if is_lazy(weight) or weight.is_meta:
        raise ValueError(
            f"`model` should have its weights. Found `{name}` without data; run one batch through "
            f"a lazy module, or load the weights of one on the meta device, before pruning."
        )
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise TypeError(
            f"`model` should have float weights of 16 bits or more. Found `{name}` of "
            f"{weight.dtype}; prune before quantising."
        )
    if weight.layout != torch.strided:
        raise ValueError(
            f"`model` should have dense weights. Found `{name}` of {weight.layout}; call "
            f"to_dense() on it first."
        )


def _check_finite(name: str, weight: nn.Parameter) -> None:
    least, most = weight.detach().aminmax()  # the quickest look at all of them; NaN comes through
    if not (least.isfinite() and most.isfinite()):
        bad = int((~weight.isfinite()).sum())
        raise ValueError(
            f"`model` should have finite weights only. Found {bad} that are NaN or infinite in "
            f"`{name}`; a network that diverged has nothing to rank."
        )


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))
