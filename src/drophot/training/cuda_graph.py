"""Training steps that are captured as a CUDA graph and repeated by one launch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drophot._core import random_state
from drophot.data.determinism import reached
from drophot.data.process_state import values_of
from drophot.training.loss import Loss

logger = logging.getLogger("drophot")

_WARM_UP_STEPS = 3  # eager steps before the capture, in which libraries choose their algorithms
_MAX_OBJECTS = 200  # objects that a loss may hold to be watched for changes in each step

Backward = Callable[..., Tensor]


def can_be_captured(model: nn.Module, optimizer: Optimizer, loss: Loss | None) -> bool:
    """Whether a graph repeats everything that a step changes."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    # A hook is Python code, which a graph would run only once.
    hooked = any(getattr(module, kind) for module in model.modules() for kind in kinds)
    on_device = isinstance(optimizer, torch.optim.SGD) or all(
        group.get("capturable") for group in optimizer.param_groups
    )
    watchable = loss is None or len(list(islice(reached(loss), _MAX_OBJECTS))) < _MAX_OBJECTS
    return is_torch_optimizer(optimizer) and on_device and not hooked and watchable


def is_torch_optimizer(optimizer: Optimizer) -> bool:
    """Whether an optimizer is one of torch's own classes, and not a subclass by a user."""
    return type(optimizer).__module__.startswith("torch.optim.")


class CapturedStep:
    """A training step on a GPU that is repeated by one launch after a few eager steps.

    Batches of another shape, such as the last one of an epoch, take eager steps. So do the next few
    batches after a change that a graph cannot see: in the optimizer's settings, state and hooks, in
    which parameters are trained, and in what the loss holds. All steps are eager if the model draws
    from Python's or NumPy's generator, if it waits for the device, or if the loss changes something
    that it holds in each call. Other Python code in a forward pass, such as a counter of calls,
    runs only once.

    With `update_is_captured=False` the graph ends with the backward pass, and `update` is called
    after each launch. A hook before the optimizer's step and a learning rate that changes in each
    step need this.
    """

    def __init__(
        self,
        backward: Backward,
        update: Callable[[], None],
        model: nn.Module,
        optimizer: Optimizer,
        loss: Loss | None,
        device: torch.device,
        *,
        update_is_captured: bool,
    ) -> None:
        self._backward, self._update = backward, update
        self._model, self._optimizer, self._loss = model, optimizer, loss
        self._device = device
        self._update_is_captured = update_is_captured
        self._side_stream = torch.cuda.Stream(device)
        self._captured_with: list[Any] | None = None
        self._shapes: list[torch.Size] | None = None
        self._warm_up_steps = 0
        self._possible = True
        self._graph: torch.cuda.CUDAGraph | None = None
        self._grads: list[tuple[nn.Parameter, Tensor | None]] = []

    def __call__(self, *batch: Tensor) -> Tensor:
        shapes = [tensor.shape for tensor in batch]
        self._shapes = self._shapes or shapes
        if not self._possible or shapes != self._shapes:
            return self._eager(*batch)
        if self._unseen_by_graph() != self._captured_with:
            self._warm_up_steps, self._graph = 0, None
        if self._warm_up_steps < _WARM_UP_STEPS:
            self._warm_up_steps += 1
            loss_before = self._loss_state()
            logits = self._eager_on_side_stream(batch)
            self._possible = self._loss_state() == loss_before  # else it changes in each call
            # After the step, as the first one creates the optimizer's averages.
            self._captured_with = self._unseen_by_graph()
            return logits
        if self._graph is None and not self._capture(batch):
            return self._eager(*batch)
        for static, new in zip(self._batch, batch, strict=True):
            static.copy_(new)
        self._graph.replay()  # type: ignore[union-attr]
        logits = self._logits.clone()
        if not self._update_is_captured:
            for parameter, grad in self._grads:  # eager steps and hooks may have replaced them
                parameter.grad = grad
            self._update()
        return logits

    def _eager(self, *batch: Tensor) -> Tensor:
        logits = self._backward(*batch)
        self._update()
        return logits

    def _eager_on_side_stream(self, batch: tuple[Tensor, ...]) -> Tensor:
        """An eager step on another stream, which a later capture requires."""
        current = torch.cuda.current_stream(self._device)
        self._side_stream.wait_stream(current)
        with torch.cuda.stream(self._side_stream):
            logits = self._eager(*batch)
        current.wait_stream(self._side_stream)
        return logits

    def _unseen_by_graph(self) -> list[Any]:
        """Everything that a graph fixes when it is captured, and whose change it would not see."""
        optimizer = self._optimizer
        groups = optimizer.param_groups
        fixed: list[Any] = [(p.requires_grad, p.data_ptr()) for g in groups for p in g["params"]]
        fixed += self._loss_state()
        if self._update_is_captured:
            fixed += [_value(g[name]) for g in groups for name in g if name != "params"]
            fixed += [id(value) for state in optimizer.state.values() for value in state.values()]
            fixed += [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]
        return fixed

    def _loss_state(self) -> list[Any]:
        return [] if self._loss is None else values_of(self._loss)

    def _capture(self, batch: tuple[Tensor, ...]) -> bool:
        self._batch = [tensor.clone() for tensor in batch]
        graph = torch.cuda.CUDAGraph()
        before = random_state.state()
        captured = self._eager if self._update_is_captured else self._backward
        try:
            with random_state.preserved_rng():
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self._logits = captured(*self._batch)
                self._possible = random_state.state() == before
        except RuntimeError as error:  # the step waits for the device, or memory is short
            logger.info("steps are not captured as a CUDA graph: %s", error)
            self._possible = False
        if self._possible:
            self._graph = graph
            self._grads = [(p, p.grad) for p in self._model.parameters()]
        return self._possible


def _value(setting: Any) -> Any:
    """A setting's number, if it is a tensor on the CPU, which may change in place."""
    return setting.tolist() if isinstance(setting, Tensor) and setting.is_cpu else setting
