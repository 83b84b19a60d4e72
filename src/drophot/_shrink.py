"""Take channels out of a network, so that it still runs as it should, or leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import lcm, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from drophot import _slots
from drophot._check import Seen, differ, first_other, look, taken
from drophot._pools import Pools
from drophot._ties import Axis, Ties
from drophot._trace import Call
from drophot._widths import Widths

Names = tuple[str, _slots.Key]  # of a module, and where in it

VIEWS = ("view", "_unsafe_view", "reshape")


class WholeHeads(Exception):  # noqa: N818 (not for users)
    """Heads cannot get narrower, so that they should go as a whole; or they cannot do that."""

    def __init__(self, heads: set[tuple[str, int]], possible: bool) -> None:
        super().__init__()
        self.heads = heads
        self.possible = possible


class Shrink:
    """A share of the channels, out of a network.

    Args:
        model: The network.
        ties: What its forward pass said.
        calls: What its forward pass did.
        weights: Whose magnitudes count.
        ratio: The share.
        training: What it does in training mode, if that is something else.
    """

    def __init__(
        self,
        model: nn.Module,
        ties: Ties,
        calls: list[Call],
        weights: Mapping[str, nn.Parameter],
        ratio: float,
        training: Sequence[Call] = (),
    ) -> None:
        self.model = model
        self.ties = ties
        self.calls = calls
        self.training = list(training)
        self.ratio = ratio
        self.weights, self._dims = self._matrices(weights)
        made = [(self.output(name), ties.of(weight)) for name, weight in self.weights.items()]
        outputs = [axis.ids.reshape(-1) for dim, axes in made for axis in axes if axis.dim == dim]
        self.pools = Pools(ties, outputs)
        self.gone = torch.zeros(ties.count, dtype=torch.bool)
        self.attributes: dict[Names, tuple[int, int]] = {}  # before and after
        self._tensors: dict[str, Tensor] = {}  # as they were
        self._new: dict[str, Tensor] = {}
        self._before: dict[Names, Any] = {}
        self._widths = Widths(model)
        self.heads_tried: set[tuple[str, int]] = set()  # whether they can go as a whole
        self._trial: tuple[dict[int, int], set[int]] | None = None  # of multiples
        self._dead: set[tuple[int, int]] = set()

    def run(self, example_inputs: Any) -> None:
        """Take the channels out.

        Args:
            example_inputs: What the forward pass was of.
        """
        try:
            while True:
                self._apply()
                if (
                    not self._fails(example_inputs, self.calls, False)
                    and not (self.training and self._fails(example_inputs, self.training, True))
                    and not self._other_values(example_inputs)
                ):
                    return
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Make the network what it was."""
        replace(self.model, self._tensors, self._before)
        self._tensors, self._before = {}, {}

    def description(self) -> dict[str, Any]:
        """New shapes and attributes, as JSON can hold them."""
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        saved = self.model.state_dict().keys()
        attributes: dict[str, dict[str, Any]] = {}
        inside = []
        for (path, key), (_, after) in self.attributes.items():
            if len(key) == 1:
                attributes.setdefault(path, {})[key[0]] = after
            else:
                inside.append([path, list(key), after])
        kept = {}
        for name, tensor in self._tensors.items():
            if name not in saved:
                whole = torch.arange(tensor.numel()).reshape(tensor.shape)
                axes = [a for a in self.ties.of(tensor) if self.gone[a.ids].any()]
                kept[name] = taken(whole, axes, self.gone).reshape(-1).tolist()
        shapes = {name: list(tensors[name].shape) for name in self._tensors}
        return {"shapes": shapes, "attributes": attributes, "inside": inside, "kept": kept}

    def reasons(self) -> dict[str, str]:
        """Why layers are whole, by their weight's name."""
        none = len(self.ties.fixed)
        first = torch.full((len(self.pools.stays),), none)
        for number, (_, ids) in enumerate(self.ties.fixed):
            channels = self.pools.channel[ids]
            first[channels] = first[channels].clamp(max=number)
        found = {}
        for name, weight in self.weights.items():
            axes = [a for a in self.ties.of(weight) if a.dim == self.output(name)]
            if weight.shape[self.output(name)] > 1 and not axes:
                found[name] = "it is not used with these inputs"
            for axis in axes:
                if self.gone[axis.ids].any():
                    continue
                ids = axis.ids.reshape(-1)
                why = int(first[self.pools.channel[ids]].min())
                if why < none:
                    found[name] = self.ties.fixed[why][0]
                elif len(self.pools.channel[ids].unique()) == 1 < len(ids):
                    found[name] = "all of its channels have to go together, or none"
                else:
                    pools = self.pools.pool[self.pools.channel[ids]]
                    size = int((self.pools.pool == pools[0]).sum())
                    found[name] = f"{self.ratio:.3g} of {size} channels are too few to remove one"
                    step = self.pools.multiples.get(size, 1)
                    if step > 1:
                        found[name] += f", as {step} have to go at a time"
        return found

    def kept(self) -> dict[str, Tensor]:
        """The outputs that each layer still has, by its weight's name."""
        found = {}
        for name, weight in self.weights.items():
            dim = self.output(name)
            stays = torch.ones(weight.shape[dim], dtype=torch.bool)
            for axis in self.ties.of(weight):
                if axis.dim == dim:
                    ids = axis.ids.movedim(dim, -1).reshape(-1, weight.shape[dim])[0]
                    stays = ~self.gone[ids]
            found[name] = stays.nonzero()[:, 0]
        return found

    def output(self, name: str) -> int:
        """The dimension of a layer's weight that its outputs are in."""
        return self._dims[name]

    def _matrices(
        self, weights: Mapping[str, nn.Parameter]
    ) -> tuple[dict[str, nn.Parameter], dict[str, int]]:
        """The weights of layers, and all other parameters that channels are made with."""
        found, dims = dict(weights), {}
        columns = torch.zeros(self.ties.count, dtype=torch.bool)
        for ids in self.ties.columns:
            columns[ids] = True
        known = {id(weight) for weight in weights.values()}
        for name in weights:
            module = self.model.get_submodule(name.rpartition(".")[0])
            dims[name] = int(isinstance(module, _ConvTransposeNd))
        for name, parameter in self.model.named_parameters():
            if id(parameter) in known or parameter.dim() < 2:
                continue
            for axis in self.ties.axes.get(parameter) or ():
                if axis.dim >= parameter.dim() - 2 and bool(columns[axis.ids].all()):
                    found[name], dims[name] = parameter, axis.dim
        return found, dims

    def _apply(self) -> None:
        weights = {weight: self.ties.of(weight) for weight in self.weights.values()}
        self.gone = self.pools.removed(self.ratio, self.pools.scores(weights))
        self._new, self._tensors, self._before = {}, {}, {}
        for tensor, name in self.ties.names.items():
            axes = [axis for axis in self.ties.axes.get(tensor) or () if self.gone[axis.ids].any()]
            if axes:
                self._tensors[name] = tensor
                self._new[name] = _small(tensor, axes, self.gone)
        known: dict[Names, Any] = {}
        for name, ids in self.ties.groups.items():
            path = name.rpartition(".")[0]
            normed = isinstance(self.model.get_submodule(path), nn.GroupNorm)
            if self.gone[ids].any():
                number = int((~self.gone[ids]).sum())
                known[path, ("num_groups" if normed else "groups",)] = number
        for path, module in self.model.named_modules():
            shapes = {}  # a tensor that two modules share has one name
            for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
                name = None if tensor is None else self.ties.names.get(tensor)
                if name in self._new:
                    shapes[attribute] = tuple(self._new[name].shape)
            groups = known.get((path, ("groups",)))
            heads = any(path == one for one, _ in self.ties.whole_heads)
            for name, value in _sizes(module, shapes, groups, heads):
                if getattr(module, name) != value:
                    known[path, (name,)] = value
            if isinstance(module, (_NormBase, nn.GroupNorm)) and not shapes:
                name = "num_channels" if isinstance(module, nn.GroupNorm) else "num_features"
                for left_now in self._normed(path, getattr(module, name)):
                    known[path, (name,)] = left_now
        self._known = known
        self._put({})

    def _normed(self, path: str, size: int) -> set[int]:
        """How many channels a norm without weights has now, if they are fewer."""
        found = set()
        for call in self.calls:
            for axis in call.inputs if call.path[-1] == path else ():
                ids = axis.ids.unique()
                if len(ids) == size and self.gone[ids].any():
                    found.add(size - int(self.gone[ids].sum()))
        return found if len(found) == 1 else set()

    def _put(self, own: Mapping[Names, Any]) -> None:
        """Put in what is left, and attributes that the network's own code reads."""
        replace(self.model, self._tensors, self._before)  # as it was
        old = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        attributes = self._known | {
            names: value for names, value in own.items() if names not in self._known
        }
        self._before = {
            (path, key): _slots.read(self.model.get_submodule(path), key)
            for path, key in attributes
        }
        self.attributes = {
            names: (_plain(self._before[names]), _plain(value))
            for names, value in attributes.items()
        }
        self._tensors = {name: old[name] for name in self._new}
        replace(self.model, self._new, attributes)

    def _fails(self, example_inputs: Any, calls: list[Call], training: bool) -> bool:
        """Whether calls do not do what they did; then something was learned of it."""

        def attempt(own: Mapping[Names, Any]) -> Seen:
            self._put(own)
            seen = look(self.model, example_inputs, calls, self.gone, training=training)
            if seen.error is not None:
                self._blame(seen, example_inputs, calls, training)
            return seen

        seen = self._widths.learn(calls, self.gone, attempt)
        if not seen.failures:
            if not training:
                self._seen = seen
            return False
        self.restore()
        self._learn(calls, seen.failures)
        return True

    def _blame(self, seen: Seen, example_inputs: Any, calls: list[Call], training: bool) -> None:
        """Raise an error of the network's own code that has nothing to do with its channels."""
        self.restore()
        nothing = torch.zeros_like(self.gone)
        again = look(self.model, example_inputs, calls, nothing, training=training)
        if again.error is not None:
            raise again.error

    def _other_values(self, example_inputs: Any) -> bool:
        """Whether the network gives other numbers than one where these channels are zero."""
        own = {names: value for names, (_, value) in self.attributes.items()}
        small = self._seen.outputs
        self.restore()
        found = self._zeroed(example_inputs, False)
        if found.failures or not any(map(differ, small, found.outputs)):
            self._put(own)
            return False
        dense = self._zeroed(example_inputs, True)
        self._put(own)
        seen = look(self.model, example_inputs, self.calls, self.gone, prints=True)
        self.restore()
        number = first_other(seen, dense)
        if number is None:
            number = len(self.calls) - 1
        why = "the values are others than those of the network where these channels are zero"
        self._learn(self.calls, {number: why})
        return True

    def _zeroed(self, example_inputs: Any, prints: bool) -> Seen:
        zeros: dict[str, Tensor] = {}
        old: dict[str, Tensor] = {}
        for tensor, name in self.ties.names.items():
            axes = [axis for axis in self.ties.axes.get(tensor) or () if self.gone[axis.ids].any()]
            if axes:
                old[name], zero = tensor, tensor.detach().clone()
                for axis in axes:
                    zero.masked_fill_(self.gone[axis.ids].to(zero.device), 0)
                zeros[name] = (
                    nn.Parameter(zero, requires_grad=tensor.requires_grad)
                    if isinstance(tensor, nn.Parameter)
                    else zero
                )
        replace(self.model, zeros, {})
        try:
            return look(
                self.model, example_inputs, self.calls, self.gone, zeroed=True, prints=prints
            )
        finally:
            current = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
            _swap(self.model, {id(current[name]): tensor for name, tensor in old.items()})

    def _learn(self, calls: list[Call], failures: Mapping[int, str]) -> None:
        """Another way where the network went wrong; in the end, fewer channels."""
        if heads := set(self._scaled_heads(calls, failures)) - self.heads_tried:
            raise WholeHeads(heads, True)
        if self._trial is not None:
            multiples, before = self._trial
            self._trial = None
            if not set(failures) < before:  # that did not help
                self.pools.multiples = multiples
        # Heads of a width that divides that of the stream: both lose a multiple of their number.
        sizes = torch.bincount(self.pools.pool)
        for number in failures:
            call = calls[number]
            here = [c for c in calls[number:] if c.path[: len(call.path)] == call.path]
            for axes, shape in [
                found for c in here for found in zip(c.outputs, c.shapes, strict=False)
            ]:
                for step, whole in self._heads(axes, shape, sizes):
                    old = self.pools.multiples.get(whole, 1)
                    if old % step and (whole, step) not in self._dead:
                        self._dead.add((whole, step))
                        self._trial = dict(self.pools.multiples), set(failures)
                        self.pools.multiples[whole] = lcm(old, step)
                        return
        places = {
            (c.path[-1], c.shapes[0][-1])
            for c in map(calls.__getitem__, failures)
            if c.name in VIEWS and c.shapes[0]
        }
        if heads := places & set(self.ties.whole_heads):
            raise WholeHeads(heads, False)
        for number, why in failures.items():
            self._fix(calls, number, why)
        self.pools.settle()

    def _fix(self, calls: list[Call], number: int, why: str) -> None:
        call = calls[number]
        where = call.path[-1] or "the model"
        near = [call]
        if not any(self.gone[axis.ids].any() for axis in call.axes):
            for other in reversed(calls[:number]):  # what its numbers may follow from
                if other.path == call.path and any(self.gone[a.ids].any() for a in other.inputs):
                    near = [other]
                    break
        for depth in range(len(call.path), -2, -1):
            axes = [axis for c in near for axis in c.axes if self.gone[axis.ids].any()]
            if axes:
                self.ties.fix(axes, f"{call.name} in {where}: {why}")
                return
            inside = call.path[: max(depth, 0)]
            near = [c for c in calls if c.path[: len(inside)] == inside]
        raise ValueError(
            f"`model` should do the same each time it is called in evaluation mode. Found that in "
            f"{where} {why}; prune the parts that do."
        )

    def _scaled_heads(
        self, calls: list[Call], failures: Mapping[int, str]
    ) -> Iterator[tuple[str, int]]:
        """Heads whose width a number follows from that should be the same, by their module."""
        for number in failures:
            call = calls[number]
            if not call.numbers or not any(isinstance(n, float) for n in call.numbers):
                continue
            near = [c for c in calls[:number] if c.path == call.path and "mm" in c.name][-1:]
            mixed = [axis for axis in call.inputs if self.gone[axis.ids].any()]
            for axis in mixed or [axis for c in near for axis in c.inputs]:
                width = axis.ids.size(axis.dim)
                if axis.dim >= axis.ids.dim() - 2 and self.gone[axis.ids].any():
                    for other in calls[:number]:
                        if other.path == call.path and other.name in VIEWS:
                            for made, shape in zip(other.outputs, other.shapes, strict=True):
                                if any(
                                    a.dim == len(shape) - 1
                                    and shape[a.dim] == width
                                    and a.ids.numel() > width
                                    for a in made
                                ):
                                    yield call.path[-1], width

    def _heads(
        self, axes: list[Axis], shape: Sequence[int], sizes: Tensor
    ) -> Iterator[tuple[int, int]]:
        """How often pools that a tensor's rows consist of are in its last dimensions, and these."""
        for axis in axes:
            pool = self.pools.pool[self.pools.channel[axis.ids.reshape(-1)[0]]]
            size = int(sizes[pool])
            for start in range(len(shape)):
                whole = prod(shape[start:])
                if whole > size > 1 and whole % size == 0 and whole in sizes:
                    yield whole // size, whole


def replace(
    model: nn.Module, tensors: Mapping[str, Tensor], attributes: Mapping[Names, Any]
) -> None:
    """Put tensors and attributes into a model, everywhere where the old ones are.

    Args:
        model: The model, changed in place.
        tensors: By the name of the parameter or buffer that they take the place of.
        attributes: By the names of the module and where in it.
    """
    old = dict(model.named_parameters()) | dict(model.named_buffers())
    _swap(model, {id(old[name]): tensor for name, tensor in tensors.items()})
    for (path, key), value in attributes.items():
        _slots.write(model.get_submodule(path), key, value)


def _swap(model: nn.Module, new: Mapping[int, Tensor]) -> None:
    """Put tensors in the place of others, by identity."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if id(tensor) in new:
                    held[name] = new[id(tensor)]  # pyright: ignore[reportArgumentType]
        if isinstance(module, nn.RNNBase):
            names = module._flat_weights_names
            module._flat_weights = [getattr(module, name, None) for name in names]


def _small(tensor: Tensor, axes: list[Axis], gone: Tensor) -> Tensor:
    """What is left of a parameter or buffer, with the memory format that it had."""
    small = taken(tensor, axes, gone)
    for dims, form in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == dims and not tensor.is_contiguous():
            small = small.contiguous(memory_format=form)
    if not isinstance(tensor, nn.Parameter):
        return small
    parameter = nn.Parameter(small, requires_grad=tensor.requires_grad)
    vars(parameter).update(vars(tensor))  # no_decay and the like
    return parameter


def _plain(value: Any) -> Any:
    return int(value) if _slots.is_whole(value) else value


def _sizes(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], groups: int | None, whole_heads: bool
) -> Iterator[tuple[str, Any]]:
    """The attributes of torch's own modules that say how large they are."""
    weight = shapes.get("weight")
    if isinstance(module, nn.MultiheadAttention):
        first = shapes.get("in_proj_weight") or shapes.get("q_proj_weight")
        if first:
            yield "embed_dim", first[1]
            rows = first[0] // (3 if shapes.get("in_proj_weight") else 1)
            if whole_heads:
                yield "num_heads", rows // module.head_dim
            else:
                yield "head_dim", rows // module.num_heads
            for name in ("k", "v"):
                own = shapes.get(f"{name}_proj_weight")
                yield f"{name}dim", own[1] if own else first[1]
    elif isinstance(module, _NormBase):
        if one := weight or shapes.get("running_mean"):
            yield "num_features", one[0]
    elif isinstance(module, nn.RNNBase):
        if taken_in := shapes.get("weight_ih_l0"):
            yield "input_size", taken_in[1]
        if mixed := shapes.get("weight_hh_l0"):
            gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
            yield "hidden_size", mixed[0] // gates
            if module.proj_size:
                yield "proj_size", mixed[1]
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
