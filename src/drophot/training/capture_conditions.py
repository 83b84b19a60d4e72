"""Steps that a CUDA graph would not repeat, and what it fixes when it is captured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain, islice
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from drophot._core.capturable_hooks import HookOwner, memory_written_by, owner_of
from drophot.data.determinism import reached
from drophot.data.process_state import values_of
from drophot.training import capture_guards
from drophot.training.loss import Loss

_MAX_OBJECTS = 200  # objects that a loss may hold to be watched for changes in each step
_MODULE_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = tuple(f"_global{kind}" for kind in _MODULE_HOOKS)
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_GLOBAL_STEP_HOOKS = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
_SCALARS = (bool, int, float, complex, str, type(None))


def obstacle(model: nn.Module, optimizer: Optimizer, loss: Loss | None) -> str | None:
    """Why no step of a training can be captured, or `None`."""
    if not is_torch_optimizer(optimizer):
        return f"{type(optimizer).__name__} is not an optimizer of torch.optim"
    if not isinstance(optimizer, torch.optim.SGD) and not all(
        group.get("capturable") for group in optimizer.param_groups
    ):
        return f"torch.optim.{type(optimizer).__name__} cannot be captured"
    for part in model.modules():
        if isinstance(part, nn.parallel.DistributedDataParallel | nn.DataParallel):
            return f"the model is wrapped in {type(part).__name__}"
    tensors = [*model.parameters(), *model.buffers()]
    if any(hasattr(tensor, "device_mesh") for tensor in tensors):
        return "the model is sharded over processes"
    if len(devices := {str(tensor.device) for tensor in tensors}) > 1:
        return f"the model is on several devices: {', '.join(sorted(devices))}"
    if loss is not None and len(list(islice(reached(loss), _MAX_OBJECTS))) == _MAX_OBJECTS:
        return f"the loss holds {_MAX_OBJECTS} objects or more"
    return None


def is_torch_optimizer(optimizer: Optimizer) -> bool:
    """Whether an optimizer is one of torch's own classes, and not a subclass by a user."""
    return type(optimizer).__module__.startswith("torch.optim.")


class Conditions:
    """Everything that a graph of a step fixes, as it is found when this object is created.

    `current` is compared before each replay. It is therefore made of numbers and short lists, and
    everything that can be looked up in advance is. Objects are compared by their ids; this object
    keeps them alive, so that no id is used twice.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: Loss | None,
        *,
        whole_step: bool,
        report: Callable[..., object] | None = None,
    ) -> None:
        self._optimizer, self._loss, self._report = optimizer, loss, report
        named = dict(model.named_modules())
        if isinstance(loss, nn.Module) and type(loss).__module__ == "torch.nn.modules.loss":
            named["loss function"], self._loss = loss, None  # holds no more than modules do
        modules = list(named.values())
        self._parameters = parameters_of(model, optimizer)
        trained = set(_trained_by(optimizer))
        self._only_differentiated = [p for p in self._parameters if p not in trained]
        self._tensors = list(filter(_has_memory, [*self._parameters, *model.buffers()]))
        self._members = [
            members
            for module in modules
            for members in (module._modules, module._parameters, module._buffers)
            if members
        ]
        self._scalars = [
            (itemgetter(*scalars), vars(module))
            for module in modules
            if (scalars := [n for n, value in vars(module).items() if type(value) in _SCALARS])
        ]
        self._module_hooks = [getattr(module_hooks, kind) for kind in _GLOBAL_HOOKS]
        self._module_hooks += [
            getattr(module, kind) for module in modules for kind in _MODULE_HOOKS
        ]
        self._step_hooks = [getattr(optimizer, kind) for kind in _STEP_HOOKS]
        self._step_hooks += _GLOBAL_STEP_HOOKS
        self._kept = [*self._tensors, *modules, *_all(self._module_hooks), *_all(self._step_hooks)]
        self._kept += [parameter.grad for parameter in self._only_differentiated]
        self._kept += [setting for group in optimizer.param_groups for setting in group.values()]
        self._kept += [value for state in optimizer.state.values() for value in state.values()]
        self._kept += memory_written_by(report) or []
        self._kept.append(_own_step(optimizer))
        self._owners: dict[int, HookOwner] = {}
        self.hook = self._hook(model, named)
        """A hook that a graph would not call, in words; `None` if there is none."""
        self.captures_update = whole_step and self._repeats_step_hooks()
        """Whether the optimizer's step can be captured, too."""

    def current(self) -> list[Any]:
        """What a graph that was captured now would fix."""
        found = self.held_by_step()
        found += map(Tensor.data_ptr, self._tensors)
        found += map(_requires_grad, self._parameters)
        found += map(id, memory_written_by(self._report) or [])
        found += [id(_own_step(self._optimizer)), capture_guards.num_replaced_generators()]
        # `optimizer.zero_grad` leaves these gradients, to which a graph adds in place.
        found += [id(parameter.grad) for parameter in self._only_differentiated]
        for hooks in chain(self._module_hooks, self._step_hooks, self._tensor_hooks()):
            if hooks:
                found += map(id, hooks.values())
        for owner in self._owners.values():
            found += owner.read_by_hooks()
        for group in self._optimizer.param_groups:
            found += map(id, group["params"])
            if self.captures_update:
                found += [_value(setting) for name, setting in group.items() if name != "params"]
        if self.captures_update:
            for state in self._optimizer.state.values():
                found += map(id, state.values())
        return found

    def held_by_step(self) -> list[Any]:
        """The values in Python objects that a step must not change for a graph to repeat it."""
        try:
            found: list[Any] = [read(attributes) for read, attributes in self._scalars]
        except KeyError:  # an attribute was deleted
            return [object()]
        found += [len(attributes) for _, attributes in self._scalars]  # one may hide a class's
        for members in self._members:
            found += map(id, members.values())
        return found if self._loss is None else found + values_of(self._loss)

    def _tensor_hooks(self) -> Iterable[dict[int, Any] | None]:
        for parameter in self._parameters:
            yield parameter._backward_hooks
            yield parameter._post_accumulate_grad_hooks

    def _hook(self, model: nn.Module, modules: dict[str, nn.Module]) -> str | None:
        if any(getattr(module_hooks, kind) for kind in _GLOBAL_HOOKS):
            return "a hook on all modules"
        if not _is_own_step(self._optimizer):
            return "the function that replaces `optimizer.step`"
        for name, module in modules.items():
            if any(getattr(module, kind) for kind in _MODULE_HOOKS):
                return f"a hook on the module `{name}`" if name else "a hook on the model"
        for name, parameter in model.named_parameters():
            for kind in _TENSOR_HOOKS:
                for hook in (getattr(parameter, kind) or {}).values():
                    if (owner := owner_of(hook)) is None:
                        return f"a hook on the parameter `{name}`"
                    self._kept.append(hook)
                    self._owners[id(owner)] = owner
        return None

    def _repeats_step_hooks(self) -> bool:
        """Whether a graph repeats everything that the hooks of the optimizer do."""
        owners = [owner_of(hook) for hook in _all(self._step_hooks)]
        self._owners |= {id(owner): owner for owner in owners if owner is not None}
        return all(owner is not None and not owner.counts_steps for owner in owners)


def _own_step(optimizer: Optimizer) -> Callable[..., Any] | None:
    """What replaces the method of the class, if anything does."""
    return vars(optimizer).get("step")


def _is_own_step(optimizer: Optimizer) -> bool:
    """Whether `optimizer.step` is the method of the class.

    Schedulers wrap it once, to see whether it was called before their own `step`.
    """
    step: Any = _own_step(optimizer)
    while getattr(step, "_wrapped_by_lr_sched", False):
        step = step.__wrapped__
    return step is None or getattr(step, "__func__", step) is type(optimizer).step


def _all(hooks: list[dict[int, Any]]) -> list[Callable[..., Any]]:
    return [hook for each in hooks for hook in each.values()]


def parameters_of(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """The parameters of a model, and those that its optimizer has in addition."""
    return list(dict.fromkeys([*model.parameters(), *_trained_by(optimizer)]))


def _trained_by(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor has an address, which sparse ones and some wrappers do not have."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def _value(setting: Any) -> Any:
    """A setting's number, which a tensor on the CPU may change in place.

    A graph reads a tensor on the device from its memory, so another tensor is another setting.
    """
    if isinstance(setting, Tensor):
        return setting.tolist() if setting.is_cpu else id(setting)
    return tuple(map(_value, setting)) if isinstance(setting, tuple) else setting


_requires_grad = attrgetter("requires_grad")
