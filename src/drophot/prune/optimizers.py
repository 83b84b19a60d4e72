"""What an optimiser is made of: those inside it, what it trains, and what it remembers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from drophot.prune.masked_products import Factors

HOOKS = ("step_pre_hooks", "step_post_hooks", "load_state_dict_post_hooks")


def members(optimizer: Any) -> list[Optimizer]:
    """The torch optimisers that an optimiser is: itself, and those that it calls.

    Accelerate's and Lightning's wrappers, SAM, Lookahead, ZeroRedundancyOptimizer and the like keep
    others in their attributes. A wrapper that never was initialised as an optimiser has no hooks.

    Args:
        optimizer: An optimiser, or an object with `step` and `param_groups` that has one.

    Returns:
        At least one, the outermost first, each once.

    Raises:
        TypeError: If it has none.
    """
    found: dict[int, Optimizer] = {}
    steps = hasattr(optimizer, "step") and hasattr(optimizer, "param_groups")
    known = isinstance(optimizer, Optimizer) or (steps and not isinstance(optimizer, nn.Module))
    queue: list[Any] = [optimizer] if known else []
    seen: set[int] = set()
    for thing in queue:
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        own = vars(thing)
        if all(f"_optimizer_{name}" in own for name in HOOKS):
            # Lightning's wrapper shares the hooks of the optimizer in it.
            found.setdefault(id(own["_optimizer_step_post_hooks"]), thing)
        for value in own.values():
            parts = value if isinstance(value, list | tuple) else (value,)
            queue += [part for part in parts if isinstance(part, Optimizer)]
    if not found:
        raise TypeError(
            f"`optimizer` should be a torch.optim.Optimizer, or hold one. Found "
            f"{type(optimizer).__name__}."
        )
    return list(found.values())


def innermost(optimizers: list[Optimizer]) -> Optimizer:
    """The one whose steps are those of training: the only one that calls no other, if any."""
    leaves = [one for one in optimizers if len(members(one)) == 1]
    return leaves[0] if len(leaves) == 1 else optimizers[0]


def trained(optimizers: Iterable[Optimizer]) -> set[int]:
    """The identities of the parameters that optimisers train."""
    return {
        id(p)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }


def zero_state(
    optimizer: Optimizer,
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    factors: Factors,
) -> None:
    """Make an optimiser forget what it remembers of removed weights.

    Tensors of a weight's shape, such as momentum or a master copy, become zero where the weight is
    removed. The curvature of LBFGS is of all weights together: it starts again if it knows any that
    are removed. Other state, such as Adafactor's means of rows, is left as it is.

    Args:
        optimizer: The optimiser.
        weights: Those that it trains and that are masked.
        masks: At least theirs, True where a weight is kept.
        factors: What multiplies by them.
    """
    for name, weight in weights.items():
        state = optimizer.state.get(weight, {})
        for tensor in _tensors(state):
            if tensor.shape == weight.shape and tensor.is_floating_point():
                if tensor.element_size() == weight.element_size():
                    factors.zero({name: tensor}, masks)
                else:
                    tensor.detach().masked_fill_(~masks[name].to(tensor.device), 0)
    if isinstance(optimizer, LBFGS):
        _check_curvature(optimizer, weights, masks)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _check_curvature(
    optimizer: LBFGS, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> None:
    """Start LBFGS again if its history has anything of a removed weight."""
    removed_of = {id(weight): ~masks[name] for name, weight in weights.items()}
    state = optimizer.state.get(optimizer.param_groups[0]["params"][0], {})
    parts = []
    for p in optimizer.param_groups[0]["params"]:
        flat = removed_of[id(p)] if id(p) in removed_of else torch.zeros_like(p, dtype=torch.bool)
        parts.append(flat.reshape(-1).to(p.device))
    removed = torch.cat(parts)
    history = [tensor for tensor in _tensors(state) if tensor.shape == removed.shape]
    if any((tensor[removed] != 0).any() for tensor in history):
        state["n_iter"] = 0  # at which it starts, without looking at the rest
        for name in ("d", "old_dirs", "old_stps", "ro", "prev_flat_grad"):
            state.pop(name, None)
