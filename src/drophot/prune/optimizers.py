"""The parts of an optimizer: wrapped optimizers, trained parameters and their state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from drophot.prune.masked_products import BitMasks

HOOKS = ("step_pre_hooks", "step_post_hooks", "load_state_dict_post_hooks")


def unwrapped(optimizer: Any) -> list[Optimizer]:
    """An optimizer and the optimizers that it wraps, the outermost first, each once.

    Wrappers (accelerate, Lightning, SAM, Lookahead, ZeroRedundancyOptimizer and others) keep
    optimizers in their attributes. A wrapper that was never initialized as an optimizer has no
    hooks.
    """
    found: dict[int, Optimizer] = {}
    steps = hasattr(optimizer, "step") and hasattr(optimizer, "param_groups")
    is_optimizer = isinstance(optimizer, Optimizer) or (
        steps and not isinstance(optimizer, nn.Module)
    )
    queue: list[Any] = [optimizer] if is_optimizer else []
    seen: set[int] = set()
    for each in queue:
        if id(each) in seen:
            continue
        seen.add(id(each))
        own = vars(each)
        if all(f"_optimizer_{name}" in own for name in HOOKS):
            # Lightning's wrapper shares the hooks of the wrapped optimizer.
            found.setdefault(id(own["_optimizer_step_post_hooks"]), each)
        for value in own.values():
            parts = value if isinstance(value, list | tuple) else (value,)
            queue += [part for part in parts if isinstance(part, Optimizer)]
    if not found:
        raise TypeError(
            f"`optimizer` must be a torch.optim.Optimizer or wrap one, got "
            f"{type(optimizer).__name__}."
        )
    return list(found.values())


def innermost(optimizers: list[Optimizer]) -> Optimizer:
    """The optimizer whose steps are counted: the only one that wraps no other, or the first."""
    leaves = [each for each in optimizers if len(unwrapped(each)) == 1]
    return leaves[0] if len(leaves) == 1 else optimizers[0]


def trained_ids(optimizers: Iterable[Optimizer]) -> set[int]:
    """The identities of the parameters that the optimizers train."""
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
    bit_masks: BitMasks,
) -> None:
    """Set the optimizer's state of removed weights to zero.

    Tensors of a weight's shape, such as momentum or a master copy, become zero where the weight is
    removed. The curvature of LBFGS belongs to all weights together: it restarts if it involves
    removed weights. Other state, such as Adafactor's means of rows, is left as it is. So is state
    in lists or with "precond" in its name, as that of Shampoo and SOAP: a preconditioner may have
    the shape of a square weight.
    """
    for name, weight in weights.items():
        state = optimizer.state.get(weight, {})
        for tensor in _of_elements(state):
            if tensor.shape == weight.shape and tensor.is_floating_point():
                if tensor.element_size() == weight.element_size():
                    bit_masks.zero_({name: tensor}, masks)
                else:
                    tensor.detach().masked_fill_(~masks[name].to(tensor.device), 0)
    if isinstance(optimizer, LBFGS):
        _check_curvature(optimizer, weights, masks)


def _of_elements(state: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors of a state that may have a value for each element of the weight.

    The matrices of Shampoo and SOAP multiply a whole dimension; zeros could make them singular.
    SOAP and others keep them in lists, one for each dimension.
    """
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _of_elements(value)
        elif isinstance(value, Tensor) and "precond" not in str(name).lower():
            yield value


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
    """Restart LBFGS if its history involves a removed weight."""
    removed_of = {id(weight): ~masks[name] for name, weight in weights.items()}
    state = optimizer.state.get(optimizer.param_groups[0]["params"][0], {})
    parts = []
    for p in optimizer.param_groups[0]["params"]:
        flat = removed_of[id(p)] if id(p) in removed_of else torch.zeros_like(p, dtype=torch.bool)
        parts.append(flat.reshape(-1).to(p.device))
    removed = torch.cat(parts)
    history = [tensor for tensor in _tensors(state) if tensor.shape == removed.shape]
    if any((tensor[removed] != 0).any() for tensor in history):
        state["n_iter"] = 0  # LBFGS then ignores the rest of its state
        for name in ("d", "old_dirs", "old_stps", "ro", "prev_flat_grad"):
            state.pop(name, None)
