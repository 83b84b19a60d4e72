"""Removes channels from a network, checks the result and keeps channels until all checks pass.

The loop is in `Rewriter.run`: select the least important channels, write the smaller tensors into
the network, adjust the width attributes that its code reads, run it and compare it call by call
with the recorded pass, and then by value with the network in which the channels are zero. Each
failure freezes the channels of the call that failed, and the loop starts again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from drophot.structured import attention_heads, width_attributes
from drophot.structured.attention_heads import VIEWS, WholeHeads
from drophot.structured.channel_groups import ChannelGroups
from drophot.structured.dependency_graph import Axis, DependencyGraph
from drophot.structured.explanation import explain
from drophot.structured.importance import Importance
from drophot.structured.layer_widths import module_widths, producing_weights
from drophot.structured.observations import PassResult, UserError, differs, first_difference
from drophot.structured.passes import run_pass
from drophot.structured.reasons import VALUES, why_kept
from drophot.structured.remaining_sizes import kept_part
from drophot.structured.similar_calls import SimilarCalls
from drophot.structured.substitution import (
    Attribute,
    replace,
    shrunk,
    swap_tensors,
    wrapped_like,
)
from drophot.structured.tracer import SIZED, RecordedCall
from drophot.structured.verification import kept_shapes
from drophot.structured.width_search import NEXT, WidthSearch

# Operators that raise an error before they are called if sizes do not match.
CHECKS_SIZES = SIZED | {"clone", "unfold", "cat", "add", "mul"}


class Rewriter:
    """Removes a share of the channels of a network.

    Args:
        model: The network.
        graph: The entries of its tensors, and how they are coupled.
        calls: The recorded calls in evaluation mode.
        weights: The weights of Conv and Linear layers, by name.
        ratio: The share to remove.
        importance: The importance of weights or of output channels.
        training: The recorded calls in training mode, if they include other operators.
        tried_heads: Heads that have already been tried as a whole.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: DependencyGraph,
        calls: list[RecordedCall],
        weights: Mapping[str, nn.Parameter],
        ratio: float,
        importance: Importance,
        training: Sequence[RecordedCall] = (),
        tried_heads: Collection[tuple[str, int]] = (),
    ) -> None:
        self.model = model
        self.graph = graph
        self.calls = calls
        self.training = list(training)
        self.ratio = ratio
        self.importance = importance
        self.tried_heads = set(tried_heads)
        self.weights, self._output_dims = producing_weights(model, graph, weights)
        produced = [
            (self.output_dim(name), graph.axes_of(weight)) for name, weight in self.weights.items()
        ]
        outputs = [
            axis.ids.reshape(-1) for dim, axes in produced for axis in axes if axis.dim == dim
        ]
        self.groups = ChannelGroups(graph, outputs)
        self.removed = torch.zeros(graph.num_entries, dtype=torch.bool)
        self.attributes: dict[Attribute, tuple[int, int]] = {}  # before and after
        self._old_tensors: dict[str, Tensor] = {}
        self._new_tensors: dict[str, Tensor] = {}
        self._old_attributes: dict[Attribute, Any] = {}
        self._layer_attributes: dict[Attribute, Any] = {}  # of torch's own modules
        self._width_search = WidthSearch(model)
        self._trial: tuple[dict[int, int], set[int]] | None = None  # multiples and failures before
        self._tried_multiples: set[tuple[int, int]] = set()
        self._shrunk: dict[str, tuple[list[tuple[int, Tensor]], Tensor]] = {}
        self._similar: dict[bool, SimilarCalls] = {}  # of the calls in training mode or evaluation
        self._num_failed: Counter[tuple[Any, ...]] = Counter()  # of similar calls
        self._runs_dense: set[bool] = set()  # modes in which the dense network raises no error
        self._evaluation = PassResult()

    def run(self, example_inputs: Any) -> None:
        """Remove the channels; if this fails, the network is unchanged."""
        try:
            while True:
                self._remove()
                if (
                    not self._fails(example_inputs, self.calls, False)
                    and not (self.training and self._fails(example_inputs, self.training, True))
                    and not self._values_differ(example_inputs)
                ):
                    return
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Restore the network as it was before pruning."""
        replace(self.model, self._old_tensors, self._old_attributes)
        self._old_tensors, self._old_attributes = {}, {}

    def description(self) -> dict[str, Any]:
        """The new shapes and attributes, in types that JSON has."""
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
        for name, tensor in self._old_tensors.items():
            if name not in saved:
                whole = torch.arange(tensor.numel()).reshape(tensor.shape)
                axes = [a for a in self.graph.axes_of(tensor) if self.removed[a.ids].any()]
                kept[name] = kept_part(whole, axes, self.removed).reshape(-1).tolist()
        shapes = {name: list(tensors[name].shape) for name in self._old_tensors}
        return {"shapes": shapes, "attributes": attributes, "inside": inside, "kept": kept}

    def reasons(self) -> tuple[dict[str, str], dict[str, str]]:
        """Why layers kept all of their channels, and why others kept some, by the weight's name."""
        found = {}
        for name, weight in self.weights.items():
            own = [axis for axis in self.graph.axes_of(weight) if axis.dim == self.output_dim(name)]
            if own or weight.shape[self.output_dim(name)] > 1:
                found[name] = own
        return explain(self.graph, self.groups, self.removed, found, self.ratio)

    def unpruned(self) -> dict[str, float]:
        """The shares of parameters that keep their shape and belong to no known layer."""
        now = dict(self.model.named_parameters())
        total = sum(self._old_tensors.get(name, tensor).numel() for name, tensor in now.items())
        return {
            name: parameter.numel() / total
            for name, parameter in now.items()
            if name not in self._old_tensors and name not in self.weights and parameter.dim() > 1
        }

    def kept_channels(self) -> dict[str, Tensor]:
        """The outputs that each layer keeps, by the weight's name."""
        found = {}
        for name, weight in self.weights.items():
            dim = self.output_dim(name)
            keeps = torch.ones(weight.shape[dim], dtype=torch.bool)
            for axis in self.graph.axes_of(weight):
                if axis.dim == dim:
                    ids = axis.ids.movedim(dim, -1).reshape(-1, weight.shape[dim])[0]
                    keeps = ~self.removed[ids]
            found[name] = keeps.nonzero()[:, 0]
        return found

    def output_dim(self, name: str) -> int:
        """The dimension of a weight that has its output channels."""
        return self._output_dims[name]

    def _remove(self) -> None:
        """Select channels and write the smaller tensors into the network."""
        weights = {
            name: (weight, self.output_dim(name), self.graph.axes_of(weight))
            for name, weight in self.weights.items()
        }
        scores = self.groups.scores(weights, self.importance)
        self.removed = self.groups.select(self.ratio, scores)
        self._new_tensors, self._old_tensors, self._old_attributes = {}, {}, {}
        for tensor, name in self.graph.names.items():
            axes = [
                axis for axis in self.graph.axes.get(tensor) or () if self.removed[axis.ids].any()
            ]
            if axes:
                self._old_tensors[name] = tensor
                self._new_tensors[name] = self._without_removed(name, tensor, axes)
        known: dict[Attribute, Any] = {}
        for name, ids in self.graph.group_entries.items():
            path = name.rpartition(".")[0]
            normed = isinstance(self.model.get_submodule(path), nn.GroupNorm)
            if self.removed[ids].any():
                number = int((~self.removed[ids]).sum())
                known[path, ("num_groups" if normed else "groups",)] = number
        for path, module in self.model.named_modules():
            shapes = {}  # a tensor that two modules share has one name
            for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
                name = None if tensor is None else self.graph.names.get(tensor)
                if name in self._new_tensors:
                    shapes[attribute] = tuple(self._new_tensors[name].shape)
            groups = known.get((path, ("groups",)))
            heads = any(path == one for one, _ in self.graph.whole_heads)
            for name, value in module_widths(module, shapes, groups, heads):
                if getattr(module, name) != value:
                    known[path, (name,)] = value
            if isinstance(module, (_NormBase, nn.GroupNorm)) and not shapes:
                name = "num_channels" if isinstance(module, nn.GroupNorm) else "num_features"
                for width in self._norm_widths(path, getattr(module, name)):
                    known[path, (name,)] = width
        self._layer_attributes = known
        self._write({})

    def _without_removed(self, name: str, tensor: Tensor, axes: list[Axis]) -> Tensor:
        """A tensor without the removed entries; the same as before if these are the same."""
        masks = [(axis.dim, self.removed[axis.ids]) for axis in axes]
        before, part = self._shrunk.get(name, ([], tensor))
        if len(before) != len(masks) or not all(
            a == b and torch.equal(one, other)
            for (a, one), (b, other) in zip(before, masks, strict=True)
        ):
            self._shrunk[name] = masks, (part := shrunk(tensor, axes, self.removed))
        return part

    def _norm_widths(self, path: str, size: int) -> set[int]:
        """The number of channels that a norm without weights has now, if it has fewer."""
        found = set()
        for call in self.calls:
            for axis in call.inputs if call.path[-1] == path else ():
                ids = axis.ids.unique()
                if len(ids) == size and self.removed[ids].any():
                    found.add(size - int(self.removed[ids].sum()))
        return found if len(found) == 1 else set()

    def _write(self, own: Mapping[Attribute, Any]) -> None:
        """Write the smaller tensors and the attributes, including those of the network's own code."""
        replace(self.model, self._old_tensors, self._old_attributes)  # as it was
        old = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        attributes = self._layer_attributes | {
            names: value for names, value in own.items() if names not in self._layer_attributes
        }
        self._old_attributes = {
            (path, key): width_attributes.read(self.model.get_submodule(path), key)
            for path, key in attributes
        }
        self.attributes = {
            names: (_plain(self._old_attributes[names]), _plain(value))
            for names, value in attributes.items()
        }
        self._old_tensors = {name: old[name] for name in self._new_tensors}
        replace(self.model, self._new_tensors, attributes)

    def _fails(self, example_inputs: Any, calls: list[RecordedCall], training: bool) -> bool:
        """Whether calls fail; if so, the channels that they need are kept from now on."""

        def attempt(own: Mapping[Attribute, Any]) -> PassResult:
            self._write(own)
            result = run_pass(
                self.model, example_inputs, calls, self.removed, training=training, shapes=shapes
            )
            if result.error is not None:
                self._raise_error_of_model(result, example_inputs, calls, training)
            return result

        shapes = kept_shapes(calls, self.removed)
        result = self._width_search.adjust(calls, self.removed, attempt)
        if not result.failures:
            if not training:
                self._evaluation = result
            return False
        self.restore()
        self._keep_more(calls, training, result.failures)
        return True

    def _raise_error_of_model(
        self, result: PassResult, example_inputs: Any, calls: list[RecordedCall], training: bool
    ) -> None:
        """Raise the error of the network's code if the dense network raises one too."""
        if training in self._runs_dense:
            return
        self.restore()
        none = torch.zeros_like(self.removed)
        again = run_pass(self.model, example_inputs, calls, none, training=training)
        if again.error is not None:
            raise UserError(again.error)
        self._runs_dense.add(training)

    def _values_differ(self, example_inputs: Any) -> bool:
        """Whether the outputs differ from those of the network in which these channels are zero."""
        own = {names: value for names, (_, value) in self.attributes.items()}
        pruned = self._evaluation.outputs
        self.restore()
        zeroed = self._run_zeroed(example_inputs, False)
        if zeroed.failures or not any(map(differs, pruned, zeroed.outputs)):
            self._write(own)
            return False
        zeroed = self._run_zeroed(example_inputs, True)
        self._write(own)
        result = run_pass(self.model, example_inputs, self.calls, self.removed, fingerprints=True)
        self.restore()
        number = first_difference(result, zeroed)
        if number is None:
            number = len(self.calls) - 1
        self._keep_more(self.calls, False, {number: VALUES})
        return True

    def _run_zeroed(self, example_inputs: Any, fingerprints: bool) -> PassResult:
        zeros: dict[str, Tensor] = {}
        old: dict[str, Tensor] = {}
        for tensor, name in self.graph.names.items():
            axes = [
                axis for axis in self.graph.axes.get(tensor) or () if self.removed[axis.ids].any()
            ]
            if axes:
                old[name], zero = tensor, tensor.detach().clone()
                for axis in axes:
                    zero.masked_fill_(self.removed[axis.ids].to(zero.device), 0)
                zeros[name] = wrapped_like(tensor, zero)
        replace(self.model, zeros, {})
        try:
            return run_pass(
                self.model,
                example_inputs,
                self.calls,
                self.removed,
                zeroed=True,
                fingerprints=fingerprints,
            )
        finally:
            current = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
            swap_tensors(self.model, {id(current[name]): tensor for name, tensor in old.items()})

    def _keep_more(
        self, calls: list[RecordedCall], training: bool, failures: Mapping[int, str]
    ) -> None:
        """Try other numbers of channels where the network failed, or else keep its channels."""
        similar = self._similar.get(training) or SimilarCalls(
            dict(self.model.named_modules()), calls
        )
        self._similar[training] = similar
        if (
            heads := set(
                attention_heads.scaled_heads(calls, failures, self.removed, similar.calls_in)
            )
            - self.tried_heads
        ):
            raise WholeHeads(heads, True)
        if self._trial is not None:
            multiples, before = self._trial
            self._trial = None
            if not set(failures) < before:  # the last trial did not help
                self.groups.multiples = multiples
        for number in failures:
            for step, whole in attention_heads.multiples(
                calls, number, similar.calls_in, self.groups
            ):
                old = self.groups.multiples.get(whole, 1)
                if old % step and (whole, step) not in self._tried_multiples:
                    self._tried_multiples.add((whole, step))
                    self._trial = dict(self.groups.multiples), set(failures)
                    self.groups.multiples[whole] = lcm(old, step)
                    return
        positions = {
            (c.path[-1], c.shapes[0][-1])
            for c in map(calls.__getitem__, failures)
            if c.name in VIEWS and c.shapes[0]
        }
        if heads := positions & set(self.graph.whole_heads):
            raise WholeHeads(heads, False)
        for number, why in self._with_similar(failures, similar).items():
            self._freeze(similar, number, why, number in failures)
        self.groups.update()

    def _with_similar(self, failures: Mapping[int, str], similar: SimilarCalls) -> dict[int, str]:
        """Add all similar calls to those that failed, if one of these failed before."""
        # If the network's code stops or takes another branch, or values differ, the calls after it
        # are not reached. Without this, each of them would take a pass.
        found = dict(failures)
        for number, why in failures.items():
            if why != VALUES and not why.startswith("code: "):
                continue  # one pass finds all of these
            path = similar.owner(number)
            key = (type(similar.modules[path]), similar.calls_in[path].index(number), why)
            self._num_failed[key] += 1
            if self._num_failed[key] > 1:
                for _, other in similar.to(path, number):
                    found.setdefault(other, why)
        return found

    def _freeze(self, similar: SimilarCalls, number: int, why: str, failed: bool) -> None:
        """Keep the channels that a call uses, or else those used by the calls around it."""
        calls = similar.calls
        call = calls[number]
        axes = [axis for axis in call.axes if self.removed[axis.ids].any()]
        if why.startswith("code: ") and number and call.name not in CHECKS_SIZES:
            # The code read the size of a tensor that it had, and did not reach this call.
            before = calls[number - 1].output_axes
            if own := [a for axes in before for a in axes if self.removed[a.ids].any()]:
                axes, call = own, calls[number - 1]
            elif not failed:
                return
        if not axes and not failed:
            return
        if not axes:
            for n in reversed(
                similar.calls_in[call.path[-1]]
            ):  # its numbers may come from these calls
                other = calls[n]
                if n < number and other.path == call.path:
                    axes = [axis for axis in other.axes if self.removed[axis.ids].any()]
                    if any(self.removed[axis.ids].any() for axis in other.inputs):
                        break
                    axes = []
        if not axes and why.startswith("code: "):
            axes = self._next_removed(calls, number)
        for path in reversed(call.path):
            if axes:
                break
            near = [calls[n] for n in similar.calls_in[path]]
            axes = [axis for c in near for axis in c.axes if self.removed[axis.ids].any()]
        if not axes:
            raise NondeterministicModel(call.name, call.path[-1])
        self.graph.freeze(axes, why_kept(call.name, call.path[-1], why))

    def _next_removed(self, calls: Sequence[RecordedCall], number: int) -> list[Axis]:
        """The removed axes of the next call: the code may have read the size of its inputs."""
        for call in calls[number : number + NEXT]:
            if axes := [axis for axis in call.axes if self.removed[axis.ids].any()]:
                return axes
        return []


def _plain(value: Any) -> Any:
    return int(value) if width_attributes.is_integer(value) else value


class NondeterministicModel(Exception):  # noqa: N818 (users get a ValueError)
    """A call differs from the recorded one although no channels are removed."""

    def __init__(self, name: str, path: str) -> None:
        super().__init__()
        self.name = name
        self.path = path
