"""Writes smaller tensors and attributes into a network, and restores it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from drophot.structured import width_attributes
from drophot.structured.dependency_graph import Axis, DependencyGraph
from drophot.structured.layer_widths import module_widths
from drophot.structured.recorded_call import RecordedCall
from drophot.structured.remaining_sizes import kept_part
from drophot.structured.substitution import (
    Attribute,
    replace,
    shrunk,
    swap_tensors,
    wrapped_like,
)


class NetworkWriter:
    """Removes entries from the tensors of a network, as often as asked, or restores them all.

    Args:
        model: The network.
        graph: The entries of its tensors.
        calls: The recorded calls in evaluation mode.
    """

    def __init__(
        self, model: nn.Module, graph: DependencyGraph, calls: Sequence[RecordedCall]
    ) -> None:
        self.model = model
        self.graph = graph
        self.calls = calls
        self.removed = torch.zeros(graph.num_entries, dtype=torch.bool, device="cpu")
        self.attributes: dict[Attribute, tuple[int, int]] = {}  # before and after
        self._old_tensors: dict[str, Tensor] = {}
        self._new_tensors: dict[str, Tensor] = {}
        self._old_attributes: dict[Attribute, Any] = {}
        self._layer_attributes: dict[Attribute, Any] = {}  # of torch's own modules
        self._shrunk: dict[str, tuple[list[tuple[int, Tensor]], Tensor]] = {}

    def remove(self, removed: Tensor) -> None:
        """Write all tensors without the removed entries, and the widths of torch's own modules."""
        self.removed = removed
        self._new_tensors, self._old_tensors, self._old_attributes = {}, {}, {}
        for name, tensor, axes in self._shrinking():
            self._old_tensors[name] = tensor
            self._new_tensors[name] = self._without_removed(name, tensor, axes)
        known: dict[Attribute, Any] = {}
        for name, ids in self.graph.group_entries.items():
            path = name.rpartition(".")[0]
            is_norm = isinstance(self.model.get_submodule(path), nn.GroupNorm)
            if removed[ids].any():
                number = int((~removed[ids]).sum())
                known[path, ("num_groups" if is_norm else "groups",)] = number
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
        self.write({})

    def write(self, model_attributes: Mapping[Attribute, Any]) -> None:
        """Write the smaller tensors, the layers' attributes and those of the network's own code."""
        replace(self.model, self._old_tensors, self._old_attributes)
        old = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        layers = self._layer_attributes
        others = {key: value for key, value in model_attributes.items() if key not in layers}
        attributes = layers | others
        self._old_attributes = {
            (path, key): width_attributes.read(self.model.get_submodule(path), key)
            for path, key in attributes
        }
        self.attributes = {
            name: (_plain(self._old_attributes[name]), _plain(value))
            for name, value in attributes.items()
        }
        self._old_tensors = {name: old[name] for name in self._new_tensors}
        replace(self.model, self._new_tensors, attributes)

    def restore(self) -> None:
        """Restore the network as it was before pruning."""
        replace(self.model, self._old_tensors, self._old_attributes)
        self._old_tensors, self._old_attributes = {}, {}

    @contextmanager
    def zeroed(self) -> Iterator[None]:
        """Set the removed entries of all tensors to zero for a while, after `restore`."""
        zeros: dict[str, Tensor] = {}
        old: dict[str, Tensor] = {}
        for name, tensor, axes in self._shrinking():
            old[name], zero = tensor, tensor.detach().clone()
            for axis in axes:
                zero.masked_fill_(self.removed[axis.ids].to(zero.device), 0)
            zeros[name] = wrapped_like(tensor, zero)
        replace(self.model, zeros, {})
        try:
            yield
        finally:
            current = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
            swap_tensors(self.model, {id(current[name]): tensor for name, tensor in old.items()})

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
        kept_positions = {}
        for name, tensor in self._old_tensors.items():
            if name not in saved:
                positions = torch.arange(tensor.numel(), device="cpu").reshape(tensor.shape)
                axes = [a for a in self.graph.axes_of(tensor) if self.removed[a.ids].any()]
                kept_positions[name] = kept_part(positions, axes, self.removed).reshape(-1).tolist()
        shapes = {name: list(tensors[name].shape) for name in self._old_tensors}
        return {
            "shapes": shapes,
            "attributes": attributes,
            "inside": inside,
            "kept_positions": kept_positions,
        }

    def unpruned(self, weights: Mapping[str, nn.Parameter]) -> dict[str, float]:
        """The shares of parameters that keep their shape and are not in `weights`."""
        now = dict(self.model.named_parameters())
        total = sum(self._old_tensors.get(name, tensor).numel() for name, tensor in now.items())
        return {
            name: parameter.numel() / total
            for name, parameter in now.items()
            if name not in self._old_tensors and name not in weights and parameter.dim() > 1
        }

    def _shrinking(self) -> Iterator[tuple[str, Tensor, list[Axis]]]:
        """The tensors that lose entries, with their axes along which they do."""
        for tensor, name in self.graph.names.items():
            axes = self.graph.axes.get(tensor) or ()
            if axes := [axis for axis in axes if self.removed[axis.ids].any()]:
                yield name, tensor, axes

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


def _plain(value: Any) -> Any:
    return int(value) if width_attributes.is_integer(value) else value
