"""Training a sparse network: removed weights, their gradients and their momentum stay zero."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Mapping
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle, unserializable_hook

from drophot.prune import earlier_masks
from drophot.prune.copied_hooks import Follower, follow, hooks_of
from drophot.prune.current_parameters import find, paths
from drophot.prune.masked_products import Factors, can_be_changed, stamp_of
from drophot.prune.optimizers import innermost, members, trained, zero_state
from drophot.prune.unheld_masks import listed, warn_of_loose, warn_of_newer


class Counting(Protocol):
    """Masks that change as training goes on: a `Schedule`."""

    masks: Any

    def _advance(self) -> bool:
        """Count a step of the optimiser."""
        ...


def is_counting(schedule: Counting) -> bool:
    """Whether a hold counts the steps of a schedule, and has counted one.

    Args:
        schedule: The schedule.

    Returns:
        Whether there is such a hold.
    """
    return any(hold._schedule is schedule and hold._stepped for hold in _active())


class Hold(Follower):
    """One optimiser that holds the masks of one model.

    Before each step the gradients of removed weights are zero, since hooks on the parameters make
    them so during the backward pass, and after each step the weights are.
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor],
        model: nn.Module,
        optimizer: Any,
        schedule: Counting | None = None,
    ) -> None:
        found = members(optimizer)
        self._model = model
        self._own, self._schedule = masks, schedule
        self._paths = paths(model, masks)
        self._optimizers = [weakref.ref(one) for one in found]
        self._counts = weakref.ref(innermost(found))
        ids = trained(found)
        self._weights = {n: weight for n, weight in self._found().items() if id(weight) in ids}
        self._setup()
        if not self._weights:
            raise ValueError(
                "`optimizer` should train the model that was pruned. Found none of its pruned "
                "weights in it. If it trains a copy of that model, or one that was loaded anew, "
                "give that model: masks.hold(optimizer, model=copy), or hold "
                "Masks.from_zeros(copy); else prune the model whose parameters it was given."
            )

    def _setup(self) -> None:
        """What a copy does not take over."""
        self._handles: dict[str, tuple[Tensor, list[RemovableHandle]]] = {}
        self._clean: dict[str, tuple[int, int] | None] = {}
        self._adds_to_clean: dict[str, bool] = {}
        self._stamp: list[tuple[int, int]] = []
        self._frozen: list[tuple[str, bool]] = []
        self._active = False
        self._applied = earlier_masks.changes()
        self._compared = self._stepped = self._went_backward = False
        self._finalizer = weakref.finalize(self, _remove, self._handles)
        self._finalizer.atexit = False
        self._number = next(_NUMBERS)

    def _start(self) -> None:
        self._active = True
        _HOLDS.add(self)

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """The masks that are held now."""
        return self._own if self._schedule is None else self._schedule.masks

    @property
    def _factors(self) -> Factors:
        """Those of the masks, so that there is one copy."""
        return self.masks._factors  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def names(self) -> list[str]:
        """The parameters that are held."""
        return list(self._weights)

    def begin(self) -> RemovableHandle:
        """Hold from now on.

        Returns:
            What ends it.
        """
        self._start()
        self._factors.zero(self._weights, self.masks)
        self._renew()
        for name, weight in self._weights.items():
            self._clean_gradient(name, weight)
        self._ids = []
        for optimizer in self._alive():
            handles = [
                optimizer.register_step_pre_hook(self.before_step),
                optimizer.register_step_post_hook(self.after_step),
                optimizer.register_load_state_dict_post_hook(self.after_loading),
            ]
            self._ids += [handle.id for handle in handles]
            follow(optimizer)
        return _Handle(self)

    def end(self, look: bool = True) -> None:
        """Hold no longer.

        Args:
            look: Whether to raise an error if the removed weights are not zero.

        Raises:
            RuntimeError: If they are not, or a schedule counted no step of all that were taken.
        """
        if not self._active:
            return
        self._active = False
        self._finalizer()
        for optimizer in self._alive():
            for hooks in hooks_of(optimizer).values():
                for number in self._ids:
                    hooks.pop(number, None)
            follow(optimizer)
        if not look:
            return
        self._check_zeros()
        if self._schedule is not None and self._went_backward and not self._stepped:
            raise RuntimeError(
                "The optimizer's `step` was never called while the schedule was held on it, so "
                "the schedule counted no steps. Hold the optimizer whose `step` is called, or "
                "call schedule.step() after each iteration."
            )

    # --- what hooks call -----------------------------------------------------------------------

    def before_step(self, *_: Any) -> None:
        """Look at what is trained now, and mask gradients that no hook has seen."""
        if not self._active:
            return
        if not torch.compiler.is_compiling():
            self._look()
            self._compare_masks()
        with torch.no_grad():
            for name, weight in self._weights.items():
                self._clean_gradient(name, weight)

    def after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Zero the removed weights, and let a schedule count."""
        if not self._active:
            return
        counted = self._schedule is not None and self._is_counted(optimizer)
        if not counted:  # a schedule zeroes all
            self._factors.zero(self._weights, self.masks)
        if hasattr(optimizer, "eval"):  # which makes weights of what it remembers: schedule-free
            zero_state(optimizer, self._weights, self.masks, self._factors)
        self._stepped = True
        if not self._compared and not torch.compiler.is_compiling():
            self._compared = True
            warn_of_loose(self._found(), self.masks, _active())
        if self._schedule is not None and counted and self._schedule._advance():
            self._renew()

    def after_loading(self, *_: Any) -> None:
        """Mask a state that was loaded."""
        self._stamp = []
        self._look()

    def _on_gradient(self, name: str, gradient: Tensor) -> Tensor | None:
        if not self._active or not any(True for _ in self._alive()):
            return None
        self._went_backward = True
        before = None if (weight := self._weights.get(name)) is None else weight.grad
        self._adds_to_clean[name] = before is None or self._is_clean(name, before)
        return self._factors.masked(name, self.masks[name], gradient)

    def _on_accumulated(self, name: str, weight: Tensor) -> None:
        if weight.grad is not None and self._adds_to_clean.get(name):
            self._clean[name] = stamp_of(weight.grad)

    # --- what is held --------------------------------------------------------------------------

    def _alive(self) -> list[Optimizer]:
        return [one for reference in self._optimizers if (one := reference()) is not None]

    def _found(self) -> dict[str, nn.Parameter]:
        """The masked parameters that the model has now."""
        found = {name: find(self._model, path) for name, path in self._paths.items()}
        return {name: weight for name, weight in found.items() if weight is not None}

    def _look(self) -> None:
        """Follow groups that joined, weights that were unfrozen and masks that were changed."""
        found, before, ids = self._found(), self._weights, trained(self._alive())
        for name, weight in before.items():
            if id(weight) in ids and found.get(name) is not weight:
                raise RuntimeError(
                    f"The optimizer trains parameters that are no longer the model's: `{name}` was "
                    f"replaced after masks.hold(optimizer), as load_state_dict(assign=True) and "
                    f"sharding do. Make a new optimizer for the model and hold that."
                )
        self._weights = {name: weight for name, weight in found.items() if id(weight) in ids}
        frozen = [(name, weight.requires_grad) for name, weight in found.items()]
        joined = [n for n, weight in self._weights.items() if before.get(n) is not weight]
        if joined or len(before) != len(self._weights) or frozen != self._frozen:
            self._frozen, self._compared = frozen, False
        if joined or self._stamp != self._versions():
            self._renew()

    def _versions(self) -> list[tuple[int, int]]:
        masks = self.masks
        return [(id(masks[name]), masks[name]._version) for name in self._weights]

    def _renew(self) -> None:
        """Hook what is trained, and forget momentum of what is removed."""
        self._stamp = self._versions()
        self._clean.clear()
        for name, weight in self._weights.items():
            known = self._handles.get(name)
            if known is None or known[0] is not weight:
                self._hook(name, weight)
        for optimizer in self._alive():
            zero_state(optimizer, self._weights, self.masks, self._factors)

    def _hook(self, name: str, weight: nn.Parameter) -> None:
        """Mask a parameter's gradients, by hooks that keep neither this nor the optimiser alive."""
        _remove({name: self._handles[name]} if name in self._handles else {})
        reference = weakref.ref(self)

        @unserializable_hook
        def on_gradient(gradient: Tensor) -> Tensor | None:
            hold = reference()
            return None if hold is None else hold._on_gradient(name, gradient)

        def on_accumulated(weight: Tensor) -> None:
            hold = reference()
            if hold is not None:
                hold._on_accumulated(name, weight)

        wanted = weight.requires_grad
        weight.requires_grad_(True)  # a frozen one takes no hook, and may be trained later
        try:
            self._handles[name] = (
                weight,
                [
                    weight.register_hook(on_gradient),
                    weight.register_post_accumulate_grad_hook(on_accumulated),
                ],
            )
        finally:
            weight.requires_grad_(wanted)

    def _clean_gradient(self, name: str, weight: Tensor) -> None:
        """Mask a gradient that was set by hand, was there before, or was changed since."""
        gradient = weight.grad
        if gradient is None:
            return
        if not torch.compiler.is_compiling() and self._is_clean(name, gradient):
            return
        if can_be_changed(gradient) and gradient.element_size() == weight.element_size():
            self._factors.zero({name: gradient}, self.masks)
        else:
            weight.grad = self._factors.masked(name, self.masks[name], gradient)

    def _is_clean(self, name: str, gradient: Tensor) -> bool:
        stamp = stamp_of(gradient)
        return stamp is not None and self._clean.get(name) == stamp

    def _is_counted(self, optimizer: Optimizer) -> bool:
        """Whether a step is one of the schedule's: those of the optimiser that was held last."""
        if torch.compiler.is_compiling():
            return True
        holds = [hold for hold in _active() if hold._schedule is self._schedule]
        last = max(holds, key=lambda hold: hold._number)
        return last is self and optimizer is self._counts()

    # --- what is said --------------------------------------------------------------------------

    def _compare_masks(self) -> None:
        """Say once what was removed since by masks that are not held."""
        if self._applied != (now := earlier_masks.changes()):
            self._applied = now
            weights = {self._paths[name]: weight for name, weight in self._weights.items()}
            warn_of_newer(self._model, weights, _active())

    def _check_zeros(self) -> None:
        masks, back = self.masks, {}
        for name, path in self._paths.items():
            weight, mask = find(self._model, path), masks[name]
            if weight is None or weight.shape != mask.shape:
                continue  # the network has other shapes now
            if name not in self._weights and weight.requires_grad:
                continue  # another optimiser's
            number = int(((weight.detach() != 0) & ~mask.to(weight.device)).count_nonzero())
            if number:
                back[name] = number
        if back:
            raise RuntimeError(
                f"{sum(back.values()):,} removed weights are no longer zero at the end of the hold "
                f"({listed(list(back))}): something other than a step of the held optimizer "
                f"changed them, such as another optimizer or a checkpoint of the dense model. The "
                f"hold has ended. Call masks.apply() to set them to zero."
            )

    def __getstate__(self) -> dict[str, Any]:
        """What a copy of the optimiser takes with it."""
        return {
            "masks": self._own,
            "schedule": self._schedule,
            "model": self._model,
            "paths": self._paths,
            "weights": self._weights,
            "optimizers": self._alive(),
            "counts": self._counts(),
            "ids": self._ids,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy holds the copied optimiser, which may not be whole yet."""
        self._own, self._schedule = state["masks"], state["schedule"]
        self._model, self._paths = state["model"], state["paths"]
        self._optimizers = [weakref.ref(one) for one in state["optimizers"]]
        self._counts = weakref.ref(state["counts"])
        self._ids = state["ids"]
        self._weights = state["weights"]
        self._setup()
        self._start()
        for name, weight in self._weights.items():
            self._hook(name, weight)
        # In a new process the numbers of hooks begin again, and should not be given twice.
        RemovableHandle.next_id = max(RemovableHandle.next_id, *(n + 1 for n in self._ids))


class _Handle(RemovableHandle):
    """Ends a hold."""

    def __init__(self, hold: Hold) -> None:
        super().__init__(OrderedDict())
        self._hold = hold

    def remove(self) -> None:
        self._hold.end()

    def __enter__(self) -> _Handle:
        if not self._hold._active:
            raise RuntimeError(
                "The hold has ended, so that nothing would be held in this `with` block. Call "
                "`hold` again for each block."
            )
        return self

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        self._hold.end(look=kind is None)

    def __getstate__(self) -> Hold:  # type: ignore[override]
        return self._hold

    def __setstate__(self, state: Hold) -> None:
        self.__init__(state)


_HOLDS: weakref.WeakSet[Hold] = weakref.WeakSet()
_NUMBERS = count()


def _active() -> list[Hold]:
    """All that hold now."""
    return [hold for hold in _HOLDS if hold._active and hold._alive()]


def _remove(handles: dict[str, tuple[Tensor, list[RemovableHandle]]]) -> None:
    for _, each in handles.values():
        for handle in each:
            handle.remove()
    handles.clear()
