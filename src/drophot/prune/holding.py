"""Train a sparse network: removed weights, their gradients and their momentum stay zero."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle, unserializable_hook

from drophot._core.capturable_hooks import set_owner
from drophot.prune import earlier_masks
from drophot.prune.copied_hooks import Follower, follow, hooks_of
from drophot.prune.current_parameters import find, paths
from drophot.prune.hold_handle import Handle
from drophot.prune.masked_products import BitMasks, SeenValues, can_be_changed
from drophot.prune.optimizers import innermost, trained_ids, unwrapped, zero_state
from drophot.prune.unheld_masks import shortened, warn_of_newer_masks, warn_of_unheld
from drophot.prune.waiting_gradients import WaitingGradients

if TYPE_CHECKING:
    from drophot.prune.masks import Masks


class Counting(Protocol):
    """A `Schedule`, whose masks change during training."""

    masks: Masks

    def _advance(self) -> bool: ...


def is_counting(schedule: Counting) -> bool:
    """Whether a hold counts the steps of the schedule and has counted one."""
    return any(hold._schedule is schedule and hold._stepped for hold in _active_holds())


class Hold(Follower):
    """One optimizer that holds the masks of one model.

    Hooks on the parameters set gradients of removed weights to zero during the backward pass. Hooks
    on the optimizer set removed weights to zero after each step.
    """

    def __init__(
        self,
        masks: Masks,
        model: nn.Module,
        optimizer: Any,
        schedule: Counting | None = None,
    ) -> None:
        found = unwrapped(optimizer)
        self._model = model
        self._given_masks, self._schedule = masks, schedule
        self._paths = paths(model, masks)
        self._optimizers = [weakref.ref(one) for one in found]
        self._counted_optimizer = weakref.ref(innermost(found))
        ids = trained_ids(found)
        current = self._current_weights()
        self.weights = {name: weight for name, weight in current.items() if id(weight) in ids}
        self._reset()
        if not self.weights:
            raise ValueError(
                "`optimizer` must train the pruned model, but it has none of the pruned weights. "
                "If it trains a copy of that model, or one loaded from a file, pass that model: "
                "masks.hold(optimizer, model=copy). Otherwise prune the model whose parameters "
                "the optimizer was given."
            )

    def _reset(self) -> None:
        """Set the attributes that a copy does not take over."""
        self._handles: dict[str, tuple[Tensor, list[RemovableHandle]]] = {}
        self._masked: dict[str, SeenValues] = {}
        self._adds_to_masked: dict[str, bool] = {}
        self._waiting = WaitingGradients()
        self._mask_versions: list[tuple[int, int]] = []
        self._trainable: list[tuple[str, bool]] = []
        self._active = False
        self._num_prunings = earlier_masks.num_calls()
        self._checked_coverage = self._stepped = self._saw_gradient = False
        self._finalizer = weakref.finalize(self, _remove_hooks, self._handles)
        self._finalizer.atexit = False
        self._order = next(_ORDERS)

    def _start(self) -> None:
        self._active = True
        _HOLDS.add(self)

    @property
    def masks(self) -> Masks:
        """The masks that are currently held."""
        return self._given_masks if self._schedule is None else self._schedule.masks

    @property
    def _bit_masks(self) -> BitMasks:
        return self.masks._bit_masks

    @property
    def names(self) -> list[str]:
        """The names of the held parameters."""
        return list(self.weights)

    def begin(self) -> RemovableHandle:
        """Start the hold; the handle ends it."""
        self._start()
        self._bit_masks.zero_(self.weights, self.masks)
        self._rehook()
        self._mask_gradients({})
        self._hook_ids = []
        for optimizer in self._live_optimizers():
            handles = [
                optimizer.register_step_pre_hook(self.before_step),
                optimizer.register_step_post_hook(self.after_step),
                optimizer.register_load_state_dict_post_hook(self.after_loading),
            ]
            self._hook_ids += [handle.id for handle in handles]
            follow(optimizer)
        return Handle(self)

    def end(self, check: bool = True) -> None:
        """End the hold, and check that removed weights are zero and the schedule counted steps."""
        if not self._active:
            return
        self._active = False
        self._finalizer()
        for optimizer in self._live_optimizers():
            for hooks in hooks_of(optimizer).values():
                for number in self._hook_ids:
                    hooks.pop(number, None)
            follow(optimizer)
        if not check:
            return
        self._check_zeros()
        if self._schedule is not None and self._saw_gradient and not self._stepped:
            raise RuntimeError(
                "The model was trained, but the `step` of the held optimizer was never called, so "
                "the schedule counted no steps. Hold the optimizer whose `step` is called, or call "
                "schedule.step() after each iteration."
            )

    # --- what a CUDA graph has to know ----------------------------------------------------------

    @property
    def counts_steps(self) -> bool:
        """Whether the hooks on the optimizer count its steps, which no graph can repeat."""
        return self._schedule is not None

    def read_by_hooks(self) -> list[tuple[int, int]]:
        """Values that change with the masks."""
        return self._current_versions()

    # --- called by hooks -----------------------------------------------------------------------

    def before_step(self, *_: Any) -> None:
        """Follow changes of the model, and mask gradients that no hook has masked."""
        if not self._active:
            return
        if not torch.compiler.is_compiling():
            self._refresh()
            self._check_newer_masks()
        with torch.no_grad():
            self._mask_gradients({})

    def after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Set removed weights to zero, and let the schedule count the step."""
        if not self._active:
            return
        counted = self._schedule is not None and self._counts_step(optimizer)
        if not counted:  # the schedule does it itself
            self._bit_masks.zero_(self.weights, self.masks)
        if hasattr(optimizer, "eval"):  # schedule-free, which computes weights from its state
            zero_state(optimizer, self.weights, self.masks, self._bit_masks)
        self._stepped = True
        if not self._checked_coverage and not torch.compiler.is_compiling():
            self._checked_coverage = True
            warn_of_unheld(self._current_weights(), self.masks, _active_holds())
        if self._schedule is not None and counted and self._schedule._advance():
            self._rehook()

    def after_loading(self, *_: Any) -> None:
        """Mask a loaded state."""
        self._mask_versions = []
        self._refresh()

    def _on_gradient(self, name: str, gradient: Tensor) -> Tensor | None:
        if not self._active or not any(True for _ in self._live_optimizers()):
            return None
        self._saw_gradient = True
        weight = self.weights.get(name)
        before = None if weight is None else weight.grad
        if weight is not None and self._waiting.add(
            name, weight, self._handles.values(), self._mask_gradients
        ):
            self._adds_to_masked.pop(name, None)
            return None
        self._adds_to_masked[name] = before is None or self._is_masked(name, before)
        return self._bit_masks.masked(name, self.masks[name], gradient)

    def _on_accumulated(self, name: str, weight: Tensor) -> None:
        if weight.grad is not None and self._adds_to_masked.get(name):
            self._masked[name] = SeenValues(weight.grad)

    # --- parameters, masks and state -----------------------------------------------------------

    def _live_optimizers(self) -> list[Optimizer]:
        return [one for reference in self._optimizers if (one := reference()) is not None]

    def _current_weights(self) -> dict[str, nn.Parameter]:
        """The masked parameters as the model has them now."""
        found = {name: find(self._model, path) for name, path in self._paths.items()}
        return {name: weight for name, weight in found.items() if weight is not None}

    def _refresh(self) -> None:
        """Follow new param groups, unfrozen weights and changed masks."""
        found, before = self._current_weights(), self.weights
        ids = trained_ids(self._live_optimizers())
        for name, weight in before.items():
            if id(weight) in ids and found.get(name) is not weight:
                raise RuntimeError(
                    f"The optimizer trains parameters that are no longer the model's: `{name}` was "
                    f"replaced after masks.hold(optimizer), as load_state_dict(assign=True) and "
                    f"sharding do. Create a new optimizer for the model and hold that one."
                )
        self.weights = {name: weight for name, weight in found.items() if id(weight) in ids}
        trainable = [(name, weight.requires_grad) for name, weight in found.items()]
        joined = [n for n, weight in self.weights.items() if before.get(n) is not weight]
        if joined or len(before) != len(self.weights) or trainable != self._trainable:
            self._trainable, self._checked_coverage = trainable, False
        if joined or self._mask_versions != self._current_versions():
            self._rehook()

    def _current_versions(self) -> list[tuple[int, int]]:
        masks = self.masks
        return [(id(masks[name]), masks[name]._version) for name in self.weights]

    def _rehook(self) -> None:
        """Hook the trained parameters, and set the optimizer's state of removed weights to zero."""
        self._mask_versions = self._current_versions()
        self._masked.clear()
        for name, weight in self.weights.items():
            hooked = self._handles.get(name)
            if hooked is None or hooked[0] is not weight:
                self._hook(name, weight)
        for optimizer in self._live_optimizers():
            zero_state(optimizer, self.weights, self.masks, self._bit_masks)

    def _hook(self, name: str, weight: nn.Parameter) -> None:
        """Mask a parameter's gradients by hooks that do not keep this or the optimizer alive."""
        _remove_hooks({name: self._handles[name]} if name in self._handles else {})
        reference = weakref.ref(self)

        @unserializable_hook
        def on_gradient(gradient: Tensor) -> Tensor | None:
            hold = reference()
            return None if hold is None else hold._on_gradient(name, gradient)

        def on_accumulated(weight: Tensor) -> None:
            hold = reference()
            if hold is not None:
                hold._on_accumulated(name, weight)

        set_owner(on_gradient, self)
        set_owner(on_accumulated, self)
        requires_grad = weight.requires_grad
        weight.requires_grad_(True)  # a frozen parameter takes no hooks, but may be trained later
        try:
            self._handles[name] = (
                weight,
                [
                    weight.register_hook(on_gradient),
                    weight.register_post_accumulate_grad_hook(on_accumulated),
                ],
            )
        finally:
            weight.requires_grad_(requires_grad)

    def _mask_gradients(self, waiting: Mapping[str, bool]) -> None:
        """Mask gradients that no hook has masked, by one operation for all layers.

        They were set or changed by hand, or were there before the hold, or they are `waiting`: see
        `WaitingGradients`.
        """
        names, in_place, copied = waiting or self.weights, {}, {}
        for name in names:
            weight = self.weights.get(name)
            if weight is None or (gradient := weight.grad) is None:
                continue
            if not torch.compiler.is_compiling() and self._is_masked(name, gradient):
                continue
            plain = gradient.layout == torch.strided and not gradient.requires_grad
            if waiting.get(name) and plain:
                copied[name] = gradient  # whose memory may be that of another new gradient
            elif can_be_changed(gradient) and gradient.element_size() == weight.element_size():
                in_place[name] = gradient
            else:
                weight.grad = self._bit_masks.masked(name, self.masks[name], gradient)
        self._bit_masks.zero_(in_place, self.masks)
        for name, gradient in self._bit_masks.masked_copies(copied, self.masks):
            self.weights[name].grad = gradient
            self._masked[name] = SeenValues(gradient)
        if not torch.compiler.is_compiling():
            for name, gradient in in_place.items():
                self._masked[name] = SeenValues(gradient)

    def _is_masked(self, name: str, gradient: Tensor) -> bool:
        seen = self._masked.get(name)
        return seen is not None and seen.are_in(gradient)

    def _counts_step(self, optimizer: Optimizer) -> bool:
        """Whether the schedule counts this step: it counts those of the last held optimizer."""
        if torch.compiler.is_compiling():
            return True
        holds = [hold for hold in _active_holds() if hold._schedule is self._schedule]
        last = max(holds, key=lambda hold: hold._order)
        return last is self and optimizer is self._counted_optimizer()

    # --- warnings and errors -------------------------------------------------------------------

    def _check_newer_masks(self) -> None:
        """Warn once about weights that other masks have removed since."""
        if self._num_prunings != (now := earlier_masks.num_calls()):
            self._num_prunings = now
            weights = {self._paths[name]: weight for name, weight in self.weights.items()}
            warn_of_newer_masks(self._model, weights, _active_holds())

    def _check_zeros(self) -> None:
        masks, nonzero = self.masks, {}
        for name, path in self._paths.items():
            weight, mask = find(self._model, path), masks[name]
            if weight is None or weight.shape != mask.shape:
                continue  # the model has other shapes now
            if name not in self.weights and weight.requires_grad:
                continue  # another optimizer trains it
            number = int(((weight.detach() != 0) & ~mask.to(weight.device)).count_nonzero())
            if number:
                nonzero[name] = number
        if nonzero:
            raise RuntimeError(
                f"{sum(nonzero.values()):,} removed weights are no longer zero at the end of the "
                f"hold ({shortened(list(nonzero))}): something other than a step of the held "
                f"optimizer changed them, such as another optimizer or a checkpoint of the dense "
                f"model. The hold has ended. Call masks.apply() to set them to zero."
            )

    def __getstate__(self) -> dict[str, Any]:
        """The state that is copied with the optimizer."""
        return {
            "masks": self._given_masks,
            "schedule": self._schedule,
            "model": self._model,
            "paths": self._paths,
            "weights": self.weights,
            "optimizers": self._live_optimizers(),
            "counts": self._counted_optimizer(),
            "ids": self._hook_ids,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Hold the copied optimizer, which may be copied only in part so far."""
        self._given_masks, self._schedule = state["masks"], state["schedule"]
        self._model, self._paths = state["model"], state["paths"]
        self._optimizers = [weakref.ref(one) for one in state["optimizers"]]
        self._counted_optimizer = weakref.ref(state["counts"])
        self._hook_ids = state["ids"]
        self.weights = state["weights"]
        self._reset()
        self._start()
        for name, weight in self.weights.items():
            self._hook(name, weight)
        # In a new process the ids of hooks start again, and no id may be used twice.
        RemovableHandle.next_id = max(RemovableHandle.next_id, *(n + 1 for n in self._hook_ids))


_HOLDS: weakref.WeakSet[Hold] = weakref.WeakSet()
_ORDERS = count()


def _active_holds() -> list[Hold]:
    return [hold for hold in _HOLDS if hold._active and hold._live_optimizers()]


def _remove_hooks(handles: dict[str, tuple[Tensor, list[RemovableHandle]]]) -> None:
    for _, each in handles.values():
        for handle in each:
            handle.remove()
    handles.clear()
