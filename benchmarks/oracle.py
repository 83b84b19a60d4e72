"""Check that a network without some channels computes what the dense one does with these at zero.

The check does not depend on how channels were chosen or coupled. All values of a tensor are
different, so its values show which entries remain; the other entries become zero in the dense
network. Norms, means and softmax over channels use only the remaining ones: both networks are
called on the same inputs, and if the input of such an operator is smaller in the pruned network,
the dense network's operator receives the entries whose values the pruned network has.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# Operators that mix the entries of a dimension in a way that zeros are not neutral to.
OVER = {
    *("native_layer_norm", "native_group_norm", "_fused_rms_norm", "native_batch_norm"),
    *("_native_batch_norm_legit", "mean", "var", "var_mean", "std", "std_mean", "_softmax"),
    *("_log_softmax", "amax", "amin", "max", "min", "logsumexp", "prod"),
    *("linalg_vector_norm", "norm", "sum"),
}


class NotChecked(Exception):  # noqa: N818 (not a fault)
    """The comparison is not possible for this network."""


class Wrong(Exception):  # noqa: N818 (of a network, not of this code)
    """The results differ."""


def distinct(model: nn.Module, seed: int = 0) -> nn.Module:
    """A network in evaluation mode in which no two values of a tensor are equal."""
    random = torch.Generator().manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=random, dtype=torch.float64)
            noise = noise.abs() if "var" in name else noise
            tensor.data.add_(noise.to(tensor.dtype), alpha=0.02)
            if len(tensor.unique()) < tensor.numel():  # 32 bits are too few for random numbers
                _spread(tensor.data, random)
    return model.eval()


def _spread(tensor: Tensor, random: torch.Generator) -> None:
    """Equally spaced values in random order, with the mean and spread of the original ones."""
    mean, spread = tensor.mean(), tensor.std(correction=0)
    order = torch.randperm(tensor.numel(), generator=random).view(tensor.shape)
    steps = (order.to(tensor.dtype) + 0.5) / tensor.numel() - 0.5
    tensor.copy_(mean + steps * spread * 12**0.5)


def kept_by_value(dense: Tensor, pruned: Tensor) -> Tensor:
    """Whether each entry of a tensor remains: a bool tensor of the shape of `dense`."""
    if dense.shape == pruned.shape and torch.equal(dense, pruned):
        return torch.ones_like(dense, dtype=torch.bool)
    if len(dense.unique()) < dense.numel():
        raise NotChecked("equal values in a tensor")
    kept = torch.isin(dense, pruned)
    if int(kept.sum()) != pruned.numel():
        raise Wrong("values that the dense network does not have")
    if not torch.equal(dense[kept], pruned.reshape(-1)):
        raise Wrong("another order of values")
    return kept


def with_zeros(dense: nn.Module, pruned: nn.Module) -> nn.Module:
    """The dense network with zeros in place of the entries that the pruned one has lost."""
    model = deepcopy(dense)
    smaller = dict(pruned.named_modules())
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or not tensor.is_floating_point() or "running_var" in name:
                continue
            left = getattr(smaller.get(path), name, None)
            if not isinstance(left, Tensor):
                raise NotChecked(f"{path}.{name} is gone as a whole")
            zeroed = tensor.detach() * kept_by_value(tensor.detach(), left.detach())
            if isinstance(tensor, nn.Parameter):  # a tied weight can be cut in two ways
                module._parameters[name] = nn.Parameter(zeroed, tensor.requires_grad)
            else:
                module._buffers[name] = zeroed
    return model


class _Seen(TorchDispatchMode):
    """Record the inputs of operators over channels."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names
        self.calls: list[tuple[str, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in self.names:
            copies = tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs or {}))
            self.calls.append((name, *copies))
        return func(*args, **(kwargs or {}))


class _Kept(TorchDispatchMode):
    """Call operators over channels with the entries that the pruned network has."""

    def __init__(self, names: set[str], calls: Sequence[tuple[str, Any, Any]]) -> None:
        super().__init__()
        self.names = names
        self.calls = list(calls)
        self.number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        out = func(*args, **kwargs)
        if name not in self.names:
            return out
        if self.number == len(self.calls) or self.calls[self.number][0] != name:
            raise NotChecked("the two networks do not call the same operators")
        _, small_args, small_kwargs = self.calls[self.number]
        self.number += 1
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        small = [t for t in tree_leaves((small_args, small_kwargs)) if isinstance(t, Tensor)]
        if all(a.shape == b.shape for a, b in zip(given, small, strict=True)):
            return out
        over = _reduced(name, args, given[0].dim())
        if all(given[0].shape[d] == small[0].shape[d] for d in over):
            return out
        numbers = [
            [x for x in tree_leaves(one) if isinstance(x, float)]
            for one in ((args, kwargs), (small_args, small_kwargs))
        ]
        if numbers[0] != numbers[1]:
            raise Wrong(f"{name} is called with {numbers[1]} instead of {numbers[0]}")
        masks, by_slice = [list[Tensor]()], None
        try:
            masks = matched(given, small, name)
            found = [_part(a, m) for a, m in zip(given, masks, strict=True)]
        except (Wrong, NotChecked):  # heads can have lost different ones
            by_slice = _remaining_by_slice(given[0], small[0]) if len(given) == 1 else None
            if by_slice is None:
                raise
            found = [given[0].gather(*by_slice)]
        parts = iter(found)
        args, kwargs = tree_map_only(Tensor, lambda _: next(parts), (small_args, small_kwargs))
        left = func(*args, **kwargs)
        one = isinstance(out, Tensor)
        outs = [out] if one else list(out)
        lefts = [left] if one else list(left)
        for place, (whole, some) in enumerate(zip(outs, lefts, strict=True)):
            if not isinstance(whole, Tensor):
                continue
            if whole.shape == some.shape:
                outs[place] = some
                continue
            put = torch.zeros_like(whole)
            if by_slice is not None:
                if some.shape != by_slice[1].shape:
                    raise NotChecked("an operator's output has other sizes than its input")
                outs[place] = put.scatter(*by_slice, some)
                continue
            keep = _positions(whole.shape, some.shape, masks[0])
            put[torch.meshgrid(*keep, indexing="ij")] = some
            outs[place] = put
        return outs[0] if one else tuple(outs)


def _reduced(name: str, args: Sequence[Any], dims: int) -> list[int]:
    """The dimensions of an operator's first tensor whose entries it mixes."""
    if name in ("native_batch_norm", "_native_batch_norm_legit"):
        training = next(arg for arg in args if isinstance(arg, bool))
        return [d for d in range(dims) if d != 1 or dims == 2] if training else []
    if name == "native_layer_norm" or name == "_fused_rms_norm":
        return list(range(dims - len(args[1]), dims))
    if name == "native_group_norm":
        return list(range(1, dims))
    said = args[2] if name in ("linalg_vector_norm", "norm") and len(args) > 2 else None
    if said is None and len(args) > 1 and name not in ("linalg_vector_norm", "norm"):
        said = args[1]
    if isinstance(said, int):
        said = [said]
    if not isinstance(said, (list, tuple)):
        said = []
    return [d % dims for d in said] if said else list(range(dims))


def matched(given: list[Tensor], small: list[Tensor], name: str) -> list[list[Tensor]]:
    """For each tensor and dimension, the entries that have the values of the pruned network.

    Weights come first: their values are all different, and the removed ones are zero.
    """
    known: dict[tuple[int, int], Tensor] = {}
    found: dict[int, list[Tensor]] = {}
    for number in sorted(range(len(given)), key=lambda i: given[i].dim()):
        dense, pruned = given[number], small[number]
        sizes = [d for d in range(dense.dim()) if dense.shape[d] != pruned.shape[d]]
        found[number] = []
        for d in range(dense.dim()):
            n, k = dense.shape[d], pruned.shape[d]
            if d not in sizes:
                found[number].append(torch.arange(n))
                continue
            rows, wanted = _rows(dense, d), _rows(pruned, d)
            if len(sizes) > 1:  # zeros add nothing here
                rows = torch.stack([rows.sum(1), rows.square().sum(1)], 1)
                wanted = torch.stack([wanted.sum(1), wanted.square().sum(1)], 1)
            else:
                step = max(1, rows.shape[1] // 256)
                rows, wanted = rows[:, ::step], wanted[:, ::step]
            named = "layer" in name or "rms" in name
            places = known.get((n, k)) if d == (dense.dim() - 1 if named else 1) else None
            if places is None:
                try:
                    places = _in_order(rows, wanted, name)
                except Wrong as error:
                    if len(sizes) > 1:  # heads can have lost different ones
                        raise NotChecked(f"{name} over several dimensions that shrank") from error
                    raise
            elif not _close(rows[places], wanted):
                raise Wrong(f"{name} has other channels than its input")
            if dense.dim() == 1 and "norm" in name:
                known[n, k] = places
            found[number].append(places)
    return [found[number] for number in range(len(given))]


def _rows(tensor: Tensor, d: int) -> Tensor:
    return tensor.movedim(d, 0).reshape(tensor.shape[d], -1).double()


def _close(some: Tensor, others: Tensor) -> bool:
    return bool(((some - others).abs() <= 1e-6 * others.abs().max().clamp(min=1e-30)).all())


def _in_order(rows: Tensor, wanted: Tensor, name: str) -> Tensor:
    """The rows that have these values, in ascending order: `(len(wanted),)`."""
    close = torch.cdist(wanted, rows, p=float("inf")) <= 1e-6 * wanted.abs().max().clamp(min=1e-30)
    places, start = [], 0
    for row in close:
        after = row[start:].nonzero()
        if not len(after):
            raise Wrong(f"{name} is given values that the dense network has not")
        start += int(after[0, 0])
        places.append(start)
        start += 1
    return torch.tensor(places)


def _part(tensor: Tensor, places: list[Tensor]) -> Tensor:
    for d, index in enumerate(places):
        if len(index) != tensor.shape[d]:
            tensor = tensor.index_select(d, index)
    return tensor


def _remaining_by_slice(dense: Tensor, pruned: Tensor) -> tuple[int, Tensor] | None:
    """The entries that remain in each slice of a dimension such as that of the heads.

    Returns the dimension that shrank and, in the shape of `pruned`, the entries along it. `None` if
    there is no dimension whose slices have, in ascending order, the values of `pruned`.
    """
    sizes = [d for d in range(dense.dim()) if dense.shape[d] != pruned.shape[d]]
    if len(sizes) != 1:
        return None
    (shrank,) = sizes
    for h in set(range(dense.dim())) - {shrank}:
        places = []
        d = shrank - (h < shrank)
        shape = [1] * (dense.dim() - 1)
        shape[d] = pruned.shape[shrank]
        try:
            for whole, some in zip(dense.unbind(h), pruned.unbind(h), strict=True):
                found = _in_order(_rows(whole, d), _rows(some, d), "the operator")
                places.append(found.view(shape).expand(some.shape))
        except Wrong:
            continue
        return shrank, torch.stack(places, h)
    return None


def _positions(whole: Sequence[int], some: Sequence[int], places: list[Tensor]) -> list[Tensor]:
    """For each dimension of an output, the entries that remain, from those of the input."""
    found = []
    for d, (n, k) in enumerate(zip(whole, some, strict=True)):
        if n == k:
            found.append(torch.arange(n))
            continue
        same = places[d : d + 1] + places
        fits = [p for p in same if len(p) == k and (not len(p) or int(p.max()) < n)]
        if not fits:
            raise NotChecked("an operator's output has other sizes than its input")
        found.append(fits[0])
    return found


class _Scales(TorchFunctionMode):
    """Attention without an explicit scale uses that of the given widths, or records its width."""

    def __init__(self, widths: list[int] | None = None) -> None:
        super().__init__()
        self.given = widths
        self.widths: list[int] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            self.widths.append((args[0] if args else kwargs["query"]).shape[-1])
            if self.given is not None and kwargs.get("scale") is None:
                kwargs |= {"scale": self.given[len(self.widths) - 1] ** -0.5}
        return func(*args, **kwargs)


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors in the output of a network."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    elif hasattr(output, "__dict__"):
        output = list(vars(output).values())
    if not isinstance(output, (list, tuple)):
        return []
    return [tensor for one in output for tensor in tensors_of(one)]


def call(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All tensors that a network returns."""
    with torch.no_grad():
        if isinstance(inputs, dict):
            return tensors_of(model(**inputs))
        return tensors_of(model(*inputs) if isinstance(inputs, tuple) else model(inputs))


def compare(dense: nn.Module, pruned: nn.Module, inputs: Sequence[Any], *, scale: bool) -> float:
    """The largest difference for any of these inputs, relative to the size of the outputs.

    Args:
        dense: The network before pruning, with distinct values.
        pruned: The pruned network.
        inputs: The inputs that both are called with.
        scale: Whether attention without an explicit scale must have the scale of the dense network;
            otherwise that of the pruned one is accepted.

    Raises:
        Wrong: If the results differ.
        NotChecked: If they cannot be compared.
    """
    zeros = with_zeros(dense, pruned)
    worst = 0.0
    for one in inputs:
        with _Seen(OVER) as seen, _Scales() as scales:
            found = call(pruned, one)
        with _Kept(OVER, seen.calls), _Scales(None if scale else scales.widths):
            expected = call(zeros, one)
        if [t.shape for t in found] != [t.shape for t in expected]:
            raise Wrong(
                f"outputs of {[tuple(t.shape) for t in found][:3]} instead of "
                f"{[tuple(t.shape) for t in expected][:3]}"
            )
        for a, b in zip(found, expected, strict=True):
            if a.is_floating_point() and a.numel():
                a, b = a.double().nan_to_num(), b.double().nan_to_num()
                worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)))
    return worst
