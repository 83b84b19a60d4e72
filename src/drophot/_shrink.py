"""Take channels out of a network, so that it still runs as it should, or leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import lcm, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from drophot import _trace
from drophot._pools import Pools
from drophot._ties import Axis, Ties
from drophot._trace import Call, Mismatch

Names = tuple[str, str]  # of a module, and of an attribute


class Shrink:
    """A share of the channels, out of a network.

    Args:
        model: The network.
        ties: What its forward pass said.
        calls: What its forward pass did.
        weights: Whose magnitudes count.
        ratio: The share.
    """

    def __init__(
        self,
        model: nn.Module,
        ties: Ties,
        calls: list[Call],
        weights: Mapping[str, nn.Parameter],
        ratio: float,
    ) -> None:
        self.model = model
        self.ties = ties
        self.calls = calls
        self.weights = weights
        self.ratio = ratio
        made = [(self.output(name), ties.of(weight)) for name, weight in weights.items()]
        outputs = [axis.ids.reshape(-1) for dim, axes in made for axis in axes if axis.dim == dim]
        self.pools = Pools(ties, outputs)
        self.gone = torch.zeros(ties.count, dtype=torch.bool)
        self.attributes: dict[Names, Any] = {}
        self._own: dict[Names, Any] = {}  # attributes that the network's own code reads
        self._tensors: dict[str, Tensor] = {}  # as they were
        self._before: dict[Names, Any] = {}

    def run(self, example_inputs: Any) -> None:
        """Take the channels out.

        Args:
            example_inputs: What the forward pass was of.
        """
        while True:
            try:
                self._apply()
                _trace.compare(self.model, example_inputs, [self._shapes(c) for c in self.calls])
                return
            except Mismatch as mismatch:
                self.restore()
                self._learn(mismatch)
            except BaseException:
                self.restore()
                raise

    def restore(self) -> None:
        """Make the network what it was."""
        replace(self.model, self._tensors, self._before)

    def description(self) -> dict[str, Any]:
        """New shapes and attributes, as JSON can hold them."""
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        attributes: dict[str, dict[str, Any]] = {}
        for (path, name), value in self.attributes.items():
            attributes.setdefault(path, {})[name] = value if isinstance(value, int) else list(value)
        shapes = {name: list(tensors[name].shape) for name in self._tensors}
        return {"shapes": shapes, "attributes": attributes}

    def reasons(self) -> dict[str, str]:
        """Why layers are whole, by their weight's name."""
        found = {}
        for name, weight in self.weights.items():
            for axis in self.ties.of(weight):
                channels = self.pools.channel[axis.ids.reshape(-1)]
                if axis.dim != self.output(name) or self.gone[axis.ids].any():
                    continue
                found[name] = "too few to remove one"
                for why, ids in self.ties.fixed:
                    if torch.isin(channels, self.pools.channel[ids]).any():
                        found[name] = why
                        break
        return found

    def kept(self) -> dict[str, Tensor]:
        """The outputs that each layer still has, by its weight's name."""
        found = {}
        for name, weight in self.weights.items():
            dim = self.output(name)
            stays = torch.ones(weight.shape[dim], dtype=torch.bool)
            for axis in self.ties.of(weight):
                if axis.dim == dim:
                    stays = ~self.gone[axis.ids.reshape(-1)]
            found[name] = stays.nonzero()[:, 0]
        return found

    def output(self, name: str) -> int:
        """The dimension of a layer's weight that its outputs are in."""
        module = self.model.get_submodule(name.rpartition(".")[0])
        return int(isinstance(module, _ConvTransposeNd))

    def _apply(self) -> None:
        weights = {weight: self.ties.of(weight) for weight in self.weights.values()}
        self.gone = self.pools.removed(self.ratio, self.pools.scores(weights))
        new: dict[str, Tensor] = {}
        self._tensors = {}
        for tensor, name in self.ties.names.items():
            axes = [axis for axis in self.ties.axes.get(tensor) or () if self.gone[axis.ids].any()]
            if axes:
                self._tensors[name] = tensor
                new[name] = _taken(tensor, axes, self.gone)
        self.attributes = dict(self._own)
        for name, ids in self.ties.groups.items():
            self.attributes[name.rpartition(".")[0], "groups"] = int((~self.gone[ids]).sum())
        for path, module in self.model.named_modules():
            shapes = {}  # a tensor that two modules share has one name
            for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
                name = None if tensor is None else self.ties.names.get(tensor)
                if name in new:
                    shapes[attribute] = tuple(new[name].shape)
            groups = self.attributes.get((path, "groups"))
            for name, value in _sizes(module, shapes, groups):
                if getattr(module, name) != value:
                    self.attributes[path, name] = value
        self._before = {
            (path, name): getattr(self.model.get_submodule(path), name)
            for path, name in self.attributes
        }
        replace(self.model, new, self.attributes)

    def _shapes(self, call: Call) -> tuple[str, list[tuple[int, ...]]]:
        """What a call is to give now."""
        shapes = []
        for number, shape in enumerate(call.shapes):
            sizes = list(shape)
            for axis in call.outputs[number] if number < len(call.outputs) else ():
                sizes[axis.dim] = _left(axis, self.gone)
            shapes.append(tuple(sizes))
        return call.name, shapes

    def _learn(self, mismatch: Mismatch) -> None:
        """Try another way where the network went wrong; in the end, fewer channels."""
        call = self.calls[mismatch.number]
        # The module's code reads a width that it was made with: ViT's `hidden_dim`.
        widths: dict[int, set[int]] = {}
        for axis in [axis for axes in call.outputs for axis in axes] + call.inputs:
            rows = axis.ids.movedim(axis.dim, -1)
            for size in {rows.size(-1), rows.numel()}:
                left = (
                    int((~self.gone[rows]).sum())
                    if size == rows.numel()
                    else _left(axis, self.gone)
                )
                widths.setdefault(size, set()).add(left)
        for path in reversed(call.path):
            module = self.model.get_submodule(path)
            found = {}
            for name, value in vars(module).items():
                new = _renewed(value, widths)
                if new != value and (path, name) not in self.attributes:
                    found[path, name] = new
            if found:
                self._own |= found
                return
        self._own = {}  # they were for these widths
        # Heads of a width that divides that of the stream: both lose a multiple of their number.
        here = [c for c in self.calls[mismatch.number :] if c.path[: len(call.path)] == call.path]
        for axis, shape in [
            found for c in here for found in zip(c.outputs, c.shapes, strict=False)
        ]:
            for step, whole in self._heads(axis, shape):
                old = self.pools.multiples.get(whole, 1)
                if old % step:
                    self.pools.multiples[whole] = lcm(old, step)
                    return
        near, where = [call], call.path[-1] or "the model"
        for depth in range(len(call.path), -2, -1):
            axes = [axis for c in near for group in (c.inputs, *c.outputs) for axis in group]
            axes = [axis for axis in axes if self.gone[axis.ids].any()]
            if axes:
                self.ties.fix(axes, f"{call.name} in {where}: {mismatch.found}")
                self.pools.settle()
                return
            inside = call.path[: max(depth, 0)]
            near = [c for c in self.calls if c.path[: len(inside)] == inside]
        raise ValueError(
            f"`model` should do the same each time it is called in evaluation mode. Found "
            f"{mismatch.found} in {where}; prune the parts that do."
        )

    def _heads(self, axes: list[Axis], shape: Sequence[int]) -> Iterator[tuple[int, int]]:
        """How often pools that a tensor's rows consist of are in its last dimensions, and these."""
        sizes = torch.bincount(self.pools.pool)
        for axis in axes:
            pool = self.pools.pool[self.pools.channel[axis.ids.reshape(-1)[0]]]
            size = int(sizes[pool])
            for start in range(len(shape)):
                whole = prod(shape[start:])
                if whole > size and whole % size == 0 and whole in sizes:
                    yield whole // size, whole


def replace(
    model: nn.Module, tensors: Mapping[str, Tensor], attributes: Mapping[Names, Any]
) -> None:
    """Put tensors and attributes into a model, everywhere where the old ones are.

    Args:
        model: The model, changed in place.
        tensors: By the name of the parameter or buffer that they take the place of.
        attributes: By the names of the module and the attribute.
    """
    old = dict(model.named_parameters()) | dict(model.named_buffers())
    new = {id(old[name]): tensor for name, tensor in tensors.items()}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if id(tensor) in new:
                    held[name] = new[id(tensor)]  # pyright: ignore[reportArgumentType]
    for (path, name), value in attributes.items():
        setattr(model.get_submodule(path), name, value)


def _taken(tensor: Tensor, axes: list[Axis], gone: Tensor) -> Tensor:
    """What is left of a tensor."""
    keep = torch.ones(tensor.shape, dtype=torch.bool)
    shape = list(tensor.shape)
    for axis in axes:
        keep &= ~gone[axis.ids]
        shape[axis.dim] = _left(axis, gone)
    left = tensor.detach()[keep.to(tensor.device)].view(shape)
    if tensor.dim() == 4 and not tensor.is_contiguous():
        left = left.contiguous(memory_format=torch.channels_last)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(left, requires_grad=tensor.requires_grad)
    return left


def _left(axis: Axis, gone: Tensor) -> int:
    row = axis.ids.movedim(axis.dim, -1).reshape(-1, axis.ids.size(axis.dim))[0]
    return int((~gone[row]).sum())


def _sizes(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], groups: int | None
) -> Iterator[tuple[str, Any]]:
    """The attributes of torch's own modules that say how large they are."""
    weight = shapes.get("weight")
    if isinstance(module, nn.MultiheadAttention):
        first = shapes.get("in_proj_weight") or shapes.get("q_proj_weight")
        if first:
            yield "embed_dim", first[1]
            yield "head_dim", first[1] // module.num_heads
            for name in ("k", "v"):
                own = shapes.get(f"{name}_proj_weight")
                yield f"{name}dim", own[1] if own else first[1]
    elif isinstance(module, _NormBase):
        if one := weight or shapes.get("running_mean"):
            yield "num_features", one[0]
    elif weight is None:
        return
    elif isinstance(module, nn.Linear):
        yield from zip(("out_features", "in_features"), weight, strict=True)
    elif isinstance(module, _ConvNd):
        own = groups or module.groups
        one, other = weight[0], weight[1] * own
        transposed = isinstance(module, _ConvTransposeNd)
        yield "in_channels", one if transposed else other
        yield "out_channels", other if transposed else one
    elif isinstance(module, nn.GroupNorm):
        yield "num_channels", weight[0]
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        yield "embedding_dim", weight[1]
    elif hasattr(module, "normalized_shape"):
        yield "normalized_shape", weight


def _renewed(value: Any, widths: Mapping[int, set[int]]) -> Any:
    """An attribute with widths that changed, where there is no doubt about them."""
    if isinstance(value, tuple):
        return tuple(_renewed(one, widths) for one in value)
    if type(value) is int and len(new := widths.get(value, ())) == 1:
        return next(iter(new))
    return value
