"""A network with all its channels, of which some are zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from drophot._core.interruptions import must_propagate
from drophot.structured.dependency_graph import Axis
from drophot.structured.observations import Seen, Stop, guarded, print_of
from drophot.structured.reduction_rules import OVER
from drophot.structured.remaining_sizes import keep_mask, left_of, taken
from drophot.structured.tracer import Call, is_view


class Zeroed(TorchDispatchMode):
    """The network with all channels, where those that are gone are zero after each call.

    What adds up or takes norms over channels does it over those that are kept.

    Args:
        calls: What it does.
        gone: The entries that are gone.
        prints: Whether to keep sums of what each call gives.
    """

    def __init__(self, calls: Sequence[Call], gone: Tensor, prints: bool) -> None:
        super().__init__()
        self.calls = calls
        self.gone = gone
        self.prints = prints
        self.seen = Seen()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with guarded():
            return self._zero(func, args, kwargs or {})

    def _zero(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, number = func.overloadpacket.__name__, self.seen.end
        if number == len(self.calls) or self.calls[number].name != name:
            self.seen.failures[number] = f"another call, {name}"
            raise Stop
        call = self.calls[number]
        self.seen.end += 1
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        lost = [[a for a in axes if self.gone[a.ids].any()] for axes in call.given]
        outputs = [[a for a in axes if self.gone[a.ids].any()] for axes in call.outputs]
        try:
            if name in OVER and any(lost):
                out = self._over_kept(func, name, args, kwargs, given, lost, call, outputs)
            else:
                out = func(*args, **kwargs)
        except Exception as error:  # with zeros it cannot be computed: no law to hold it to
            if must_propagate(error):
                raise
            self.seen.failures[number] = "size"
            raise Stop from error
        leaves, spec = tree_flatten(out)
        place, changed = 0, False
        for i, (leaf, before) in enumerate(zip(leaves, call.leaves, strict=False)):
            if isinstance(leaf, torch.ScriptObject):
                continue
            if not isinstance(leaf, Tensor):
                leaves[i], changed = before, True
                continue
            axes = outputs[place] if place < len(outputs) else []
            place += 1
            shares = is_view(leaf, given)
            if isinstance(before, Tensor):
                if leaf.shape == before.shape and not (shares and not name.endswith("_")):
                    leaf.copy_(before)
                elif leaf.shape != before.shape:
                    leaves[i], changed = before.clone(), True
            elif axes and (not shares or name.endswith("_")):
                for axis in axes:
                    leaf.masked_fill_(self.gone[axis.ids].to(leaf.device), 0)
        if self.prints:
            outs = [t for t in leaves if isinstance(t, Tensor)]
            whole = [outputs[i] if i < len(outputs) else [] for i in range(len(outs))]
            self.seen.prints.append([
                print_of(taken(t, axes, self.gone)) for t, axes in zip(outs, whole, strict=True)
            ])
        return tree_unflatten(leaves, spec) if changed else out

    def _over_kept(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: Any,
        given: list[Tensor],
        lost: list[list[Axis]],
        call: Call,
        outputs: list[list[Axis]],
    ) -> Any:
        kept = iter([taken(t, axes, self.gone) for t, axes in zip(given, lost, strict=True)])
        args, kwargs = tree_map_only(Tensor, lambda _: next(kept), (args, kwargs))
        sizes = list(args)
        if name in ("native_layer_norm", "_fused_rms_norm"):
            sizes[1] = list(args[0].shape[-len(args[1]) :])
        elif name == "native_group_norm":
            sizes[6] = left_of(call.shapes[1], outputs[1], self.gone)[1]
            sizes[4] = args[0].shape[1]
        leaves, spec = tree_flatten(func(*sizes, **kwargs))
        for place, leaf in enumerate(leaves):
            shape = tuple(call.shapes[place])
            if isinstance(leaf, Tensor) and tuple(leaf.shape) != shape:
                axes = outputs[place] if place < len(outputs) else []
                whole = leaf.new_zeros(shape)
                whole[keep_mask(shape, axes, self.gone).to(leaf.device)] = leaf.reshape(-1)
                leaves[place] = whole
        return tree_unflatten(leaves, spec)
