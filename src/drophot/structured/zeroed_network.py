"""Runs a network with all of its channels, of which some are zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from drophot._core.interruptions import must_propagate
from drophot.structured.checked_pass import CheckedPass
from drophot.structured.dependency_graph import Axis
from drophot.structured.observations import StopPass, fingerprint
from drophot.structured.recorded_call import RecordedCall, is_view
from drophot.structured.reduction_rules import OVER_CHANNELS
from drophot.structured.remaining_sizes import keep_mask, kept_part, kept_shape


class ZeroedPass(CheckedPass):
    """Sets removed entries to zero after each call of the network with all channels.

    Norms, means and other operators that are defined over the remaining channels are called
    without the removed entries.
    """

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, number = func.overloadpacket.__name__, self.result.num_reached
        if number == len(self.calls) or self.calls[number].name != name:
            self.result.failures[number] = f"another operator, {name}"
            raise StopPass
        call = self.calls[number]
        self.result.num_reached += 1
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        input_axes = [self.shrinking(axes) for axes in call.input_axes]
        output_axes = [self.shrinking(axes) for axes in call.output_axes]
        try:
            if name in OVER_CHANNELS and any(input_axes):
                out = self._without_removed(
                    func, name, args, kwargs, inputs, input_axes, call, output_axes
                )
            else:
                out = func(*args, **kwargs)
        except Exception as error:  # it cannot run with zeros, so nothing can be compared
            if must_propagate(error):
                raise
            self.result.failures[number] = "size"
            raise StopPass from error
        leaves, spec = tree_flatten(out)
        position, changed = 0, False
        for i, (leaf, before) in enumerate(zip(leaves, call.leaves, strict=False)):
            if isinstance(leaf, torch.ScriptObject):
                continue
            if not isinstance(leaf, Tensor):
                leaves[i], changed = before, True
                continue
            axes = output_axes[position] if position < len(output_axes) else []
            position += 1
            shares = is_view(leaf, inputs)
            if isinstance(before, Tensor):
                if leaf.shape == before.shape and not (shares and not name.endswith("_")):
                    leaf.copy_(before)
                elif leaf.shape != before.shape:
                    leaves[i], changed = before.clone(), True
            elif axes and (not shares or name.endswith("_")):
                for axis in axes:
                    leaf.masked_fill_(self.removed[axis.ids].to(leaf.device), 0)
        if self.fingerprints:
            outs = [t for t in leaves if isinstance(t, Tensor)]
            whole = [output_axes[i] if i < len(output_axes) else [] for i in range(len(outs))]
            self.result.fingerprints.append([
                fingerprint(kept_part(t, axes, self.removed))
                for t, axes in zip(outs, whole, strict=True)
            ])
        return tree_unflatten(leaves, spec) if changed else out

    def _without_removed(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: Any,
        inputs: list[Tensor],
        input_axes: list[list[Axis]],
        call: RecordedCall,
        output_axes: list[list[Axis]],
    ) -> Any:
        """Call an operator without the removed entries, and pad its result with zeros."""
        parts = iter([
            kept_part(t, axes, self.removed) for t, axes in zip(inputs, input_axes, strict=True)
        ])
        args, kwargs = tree_map_only(Tensor, lambda _: next(parts), (args, kwargs))
        sizes = list(args)
        if name in ("native_layer_norm", "_fused_rms_norm"):
            sizes[1] = list(args[0].shape[-len(args[1]) :])
        elif name == "native_group_norm":
            sizes[6] = kept_shape(call.shapes[1], output_axes[1], self.removed)[1]
            sizes[4] = args[0].shape[1]
        leaves, spec = tree_flatten(func(*sizes, **kwargs))
        for position, leaf in enumerate(leaves):
            shape = tuple(call.shapes[position])
            if isinstance(leaf, Tensor) and tuple(leaf.shape) != shape:
                axes = output_axes[position] if position < len(output_axes) else []
                whole = leaf.new_zeros(shape)
                whole[keep_mask(shape, axes, self.removed).to(leaf.device)] = leaf.reshape(-1)
                leaves[position] = whole
        return tree_unflatten(leaves, spec)
