"""Take channels out of a network, so that it still runs as it should, or leave it as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from drophot.structured import attention_heads, width_attributes
from drophot.structured.attention_heads import VIEWS, WholeHeads
from drophot.structured.channel_groups import Pools
from drophot.structured.dependency_graph import Axis, Ties
from drophot.structured.layer_widths import matrices, sizes
from drophot.structured.observations import Seen, UsersError, differ, first_other
from drophot.structured.passes import look
from drophot.structured.reasons import VALUES, reasons, why_whole
from drophot.structured.remaining_sizes import taken
from drophot.structured.substitution import Names, like, replace, small, swap
from drophot.structured.tracer import SIZED, Call
from drophot.structured.verification import shapes_left
from drophot.structured.width_search import NEXT, Alike, Widths

# Operators that torch refuses before they are called where the sizes do not fit.
MADE_OF_SIZES = SIZED | {"clone", "unfold", "cat", "add", "mul"}


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
        self.weights, self._dims = matrices(model, ties, weights)
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
        self._cuts: dict[str, tuple[list[tuple[int, Tensor]], Tensor]] = {}
        self._like: dict[bool, Alike] = {}  # of the calls in training mode, or in evaluation
        self._failed: Counter[tuple[Any, ...]] = Counter()  # how often calls that are alike did
        self._innocent: set[bool] = set()  # modes in which the dense network's code runs

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

    def reasons(self) -> tuple[dict[str, str], dict[str, str]]:
        """Why layers are whole, and why others lost fewer channels, by their weight's name."""
        found = {}
        for name, weight in self.weights.items():
            own = [axis for axis in self.ties.of(weight) if axis.dim == self.output(name)]
            if own or weight.shape[self.output(name)] > 1:
                found[name] = own
        return reasons(self.ties, self.pools, self.gone, found, self.ratio)

    def other(self) -> dict[str, float]:
        """Parameters of no layer known here that keep their shape, and their share of all."""
        now = dict(self.model.named_parameters())
        total = sum(self._tensors.get(name, tensor).numel() for name, tensor in now.items())
        return {
            name: parameter.numel() / total
            for name, parameter in now.items()
            if name not in self._tensors and name not in self.weights and parameter.dim() > 1
        }

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

    def _apply(self) -> None:
        weights = {weight: self.ties.of(weight) for weight in self.weights.values()}
        self.gone = self.pools.removed(self.ratio, self.pools.scores(weights))
        self._new, self._tensors, self._before = {}, {}, {}
        for tensor, name in self.ties.names.items():
            axes = [axis for axis in self.ties.axes.get(tensor) or () if self.gone[axis.ids].any()]
            if axes:
                self._tensors[name] = tensor
                self._new[name] = self._cut(name, tensor, axes)
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
            for name, value in sizes(module, shapes, groups, heads):
                if getattr(module, name) != value:
                    known[path, (name,)] = value
            if isinstance(module, (_NormBase, nn.GroupNorm)) and not shapes:
                name = "num_channels" if isinstance(module, nn.GroupNorm) else "num_features"
                for left_now in self._normed(path, getattr(module, name)):
                    known[path, (name,)] = left_now
        self._known = known
        self._put({})

    def _cut(self, name: str, tensor: Tensor, axes: list[Axis]) -> Tensor:
        """What is left of a tensor; the same one as before where the same is gone."""
        lost = [(axis.dim, self.gone[axis.ids]) for axis in axes]
        before, cut = self._cuts.get(name, ([], tensor))
        if len(before) != len(lost) or not all(
            a == b and torch.equal(one, other)
            for (a, one), (b, other) in zip(before, lost, strict=True)
        ):
            self._cuts[name] = lost, (cut := small(tensor, axes, self.gone))
        return cut

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
            (path, key): width_attributes.read(self.model.get_submodule(path), key)
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
            seen = look(
                self.model, example_inputs, calls, self.gone, training=training, shapes=shapes
            )
            if seen.error is not None:
                self._blame(seen, example_inputs, calls, training)
            return seen

        shapes = shapes_left(calls, self.gone)
        seen = self._widths.learn(calls, self.gone, attempt)
        if not seen.failures:
            if not training:
                self._seen = seen
            return False
        self.restore()
        self._learn(calls, training, seen.failures)
        return True

    def _blame(self, seen: Seen, example_inputs: Any, calls: list[Call], training: bool) -> None:
        """Raise an error of the network's own code that has nothing to do with its channels."""
        if training in self._innocent:
            return
        self.restore()
        nothing = torch.zeros_like(self.gone)
        again = look(self.model, example_inputs, calls, nothing, training=training)
        if again.error is not None:
            raise UsersError(again.error)
        self._innocent.add(training)

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
        self._learn(self.calls, False, {number: VALUES})
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
                zeros[name] = like(tensor, zero)
        replace(self.model, zeros, {})
        try:
            return look(
                self.model, example_inputs, self.calls, self.gone, zeroed=True, prints=prints
            )
        finally:
            current = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
            swap(self.model, {id(current[name]): tensor for name, tensor in old.items()})

    def _learn(self, calls: list[Call], training: bool, failures: Mapping[int, str]) -> None:
        """Another way where the network went wrong; in the end, fewer channels."""
        alike = self._like.get(training) or Alike(dict(self.model.named_modules()), calls)
        self._like[training] = alike
        if (
            heads := set(attention_heads.scaled(calls, failures, self.gone, alike.inside))
            - self.heads_tried
        ):
            raise WholeHeads(heads, True)
        if self._trial is not None:
            multiples, before = self._trial
            self._trial = None
            if not set(failures) < before:  # that did not help
                self.pools.multiples = multiples
        for number in failures:
            for step, whole in attention_heads.multiples(calls, number, alike.inside, self.pools):
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
        for number, why in self._with_others(failures, alike).items():
            self._fix(alike, number, why, number in failures)
        self.pools.settle()

    def _with_others(self, failures: Mapping[int, str], alike: Alike) -> dict[int, str]:
        """Add to calls that fail all of their kind, where one of these failed before."""
        # Where a network's code stops or goes another way, or the first values differ, the next
        # calls are not seen: one after the other they would take a pass each.
        found = dict(failures)
        for number, why in failures.items():
            if why != VALUES and not why.startswith("code: "):
                continue  # all of these are seen at once
            path = alike.owner(number)
            key = (type(alike.modules[path]), alike.inside[path].index(number), why)
            self._failed[key] += 1
            if self._failed[key] > 1:
                for _, other in alike.to(path, number):
                    found.setdefault(other, why)
        return found

    def _fix(self, alike: Alike, number: int, why: str, failed: bool) -> None:
        """Let the channels stay that a call is about, or that what is around it is about."""
        calls = alike.calls
        call = calls[number]
        axes = [axis for axis in call.axes if self.gone[axis.ids].any()]
        if why.startswith("code: ") and number and call.name not in MADE_OF_SIZES:
            # The code looked at what it had, and did not come to this call.
            before = calls[number - 1].outputs
            if own := [a for axes in before for a in axes if self.gone[a.ids].any()]:
                axes, call = own, calls[number - 1]
            elif not failed:
                return
        if not axes and not failed:
            return
        if not axes:
            for n in reversed(alike.inside[call.path[-1]]):  # what its numbers may follow from
                other = calls[n]
                if n < number and other.path == call.path:
                    axes = [axis for axis in other.axes if self.gone[axis.ids].any()]
                    if any(self.gone[axis.ids].any() for axis in other.inputs):
                        break
                    axes = []
        if not axes and why.startswith("code: "):
            axes = self._next(calls, number)
        for path in reversed(call.path):
            if axes:
                break
            near = [calls[n] for n in alike.inside[path]]
            axes = [axis for c in near for axis in c.axes if self.gone[axis.ids].any()]
        if not axes:
            raise Capricious(call.name, call.path[-1])
        self.ties.fix(axes, why_whole(call.name, call.path[-1], why))

    def _next(self, calls: Sequence[Call], number: int) -> list[Axis]:
        """What is gone at the next call: code looks at what it is about to use."""
        for call in calls[number : number + NEXT]:
            if axes := [axis for axis in call.axes if self.gone[axis.ids].any()]:
                return axes
        return []


def _plain(value: Any) -> Any:
    return int(value) if width_attributes.is_whole(value) else value


class Capricious(Exception):  # noqa: N818 (not for users)
    """A call does something else where nothing is gone."""

    def __init__(self, name: str, path: str) -> None:
        super().__init__()
        self.name = name
        self.path = path
