"""Training steps that are captured as a CUDA graph and repeated by one launch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drophot._core import random_state
from drophot._core.capturable_hooks import memory_written_by
from drophot._core.user_warnings import warn
from drophot.training.capture_conditions import Conditions, parameters_of
from drophot.training.capture_guards import (
    empty_graph_refused,
    has_earlier_nodes,
    mark_earlier_nodes,
    mark_own_nodes,
    noticed_hooks,
    unchanged_on_error,
)
from drophot.training.loss import Loss

logger = logging.getLogger("drophot")

_WARM_UP_STEPS = 3  # eager steps before the capture, in which libraries choose their algorithms

Backward = Callable[..., Tensor]
OnBatch = Callable[[Tensor, Tensor, Tensor], object]


class CapturedStep:
    """A training step on a GPU that is repeated by one launch after a few eager steps.

    Batches of another shape, such as the last one of an epoch, take eager steps. So do the next few
    batches after a change that a graph cannot see; `Conditions` finds these. All steps are eager
    while there are hooks that a graph would not call. They stay eager if the model draws from
    Python's or NumPy's generator or waits for the device, or if the model or the loss changes an
    attribute in each call.

    With `captures_update=False` the graph ends with the backward pass, and `update` is called after
    each launch. A hook before the optimizer's step and a learning rate that changes in each step
    need this.

    `report(index, logits, targets)` is called in each step, too. It is part of the graph if it
    writes to memory on the model's device.
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
        captures_update: bool,
        report: OnBatch | None,
        keeps_logits: bool,
    ) -> None:
        self._backward, self._update = backward, update
        self._model, self._optimizer, self._loss = model, optimizer, loss
        self._device = device
        self._report, self.reports = report, report is not None
        self._report_is_captured = False
        self._captures_update, self._keeps_logits = captures_update, keeps_logits
        self._update_is_captured = captures_update
        self._side_stream = torch.cuda.Stream(device)
        self._conditions: Conditions | None = None
        self._captured_with: list[Any] = []
        self._signature: list[Any] | None = None
        self._warm_up_steps = 0
        self._possible = True
        self._told: set[str] = set()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: list[Tensor] = []
        self._grads: list[tuple[Tensor, Tensor | None]] = []

    def __call__(self, *batch: Tensor, index: Tensor | None = None) -> Tensor:
        if self._report is not None and index is not None:
            batch = *batch, index.to(batch[0].device, non_blocking=True)
        signature = [(tensor.shape, tensor.dtype) for tensor in batch]
        self._signature = self._signature or signature
        if not self._possible or signature != self._signature:
            return self._eager(*batch)
        conditions = self._conditions
        if conditions is None or conditions.current() != self._captured_with:
            self._warm_up_steps, self._graph = 0, None
        elif conditions.hook is not None:
            self._tell(f"a graph would not call {conditions.hook}")
            return self._eager(*batch)
        if self._warm_up_steps < _WARM_UP_STEPS:
            return self._warm_up(batch)
        if self._graph is None and not self._capture(batch):
            return self._eager(*batch)
        return self._replay(batch)

    def inputs_for(self, size: int) -> Tensor | None:
        """Where the inputs of the next batch, of `size` samples, can be written to save a copy."""
        fits = self._graph is not None and len(self._batch[0]) == size
        return self._batch[0] if fits else None

    def _eager(self, *batch: Tensor) -> Tensor:
        return self._run(batch, updates=True, reports=True)

    def _run(self, batch: Sequence[Tensor], *, updates: bool, reports: bool) -> Tensor:
        """A step, or the part of one that a graph repeats."""
        logits = self._backward(*(batch if self._report is None else batch[:-1]))
        if updates:
            self._update()
        if reports:
            self._tell_logits(batch, logits)
        return logits

    def _tell_logits(self, batch: Sequence[Tensor], logits: Tensor) -> None:
        if self._report is not None:
            self._report(batch[-1], logits, batch[1])

    def _warm_up(self, batch: tuple[Tensor, ...]) -> Tensor:
        """An eager step on the stream that a later capture uses."""
        if self._warm_up_steps == 0:
            torch.clear_autocast_cache()  # which keeps nodes of the parameters in use
            mark_earlier_nodes(self._parameters())
        self._warm_up_steps += 1
        last = self._warm_up_steps == _WARM_UP_STEPS
        before = self._conditions.held_by_step() if last and self._conditions else None
        current = torch.cuda.current_stream(self._device)
        self._side_stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._side_stream), noticed_hooks() as hooked:
                logits = self._eager(*batch)
        finally:  # after an error, too: the weights may still be written to
            current.wait_stream(self._side_stream)
        mark_own_nodes(self._parameters())
        if before is not None and self._conditions and before != self._conditions.held_by_step():
            self._give_up("the model or the loss changes an attribute in each call")
        if hooked:
            self._give_up("the model or the loss puts a hook on a tensor in each call")
        # After the step, as the first one creates the optimizer's averages.
        self._conditions = Conditions(
            self._model,
            self._optimizer,
            self._loss,
            whole_step=self._captures_update,
            report=self._report,
        )
        self._captured_with = self._conditions.current()
        return logits

    def _replay(self, batch: tuple[Tensor, ...]) -> Tensor:
        for static, new in zip(self._batch, batch, strict=True):
            if static is not new:
                static.copy_(new)
        self._graph.replay()  # type: ignore[union-attr]
        logits = self._logits.clone() if self._keeps_logits else self._logits
        # An eager step or a hook may have replaced the gradients. It replaces all of them.
        if not self._update_is_captured or any(p.grad is not grad for p, grad in self._grads[:1]):
            for parameter, grad in self._grads:
                parameter.grad = grad
        if not self._update_is_captured:
            self._update()
        if not self._report_is_captured:
            self._tell_logits(batch, logits)
        return logits

    def _capture(self, batch: tuple[Tensor, ...]) -> bool:
        """Record a step, which does not run. Nothing has changed if this fails."""
        if has_earlier_nodes(self._parameters()):
            self._fall_back(
                "a tensor that was computed by `model` before `fit` is still in use, such as a "
                "loss. Delete it, or call `detach()` on it"
            )
            return False
        self._batch = [tensor.clone() for tensor in batch]
        self._update_is_captured = self._conditions is not None and self._conditions.captures_update
        memory = memory_written_by(self._report)
        self._report_is_captured = memory is not None and all(
            tensor.device == batch[0].device for tensor in memory
        )
        before = random_state.state()
        try:
            with (
                unchanged_on_error(self._optimizer, self._device),
                random_state.preserved_rng(),
                # Selects the model's device, too, and returns to this stream after an error.
                torch.cuda.stream(self._side_stream),
                empty_graph_refused(),
            ):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(
                    graph, stream=self._side_stream, capture_error_mode="thread_local"
                ):
                    self._logits = self._run(
                        self._batch,
                        updates=self._update_is_captured,
                        reports=self._report_is_captured,
                    )
                drawn = random_state.state() != before
        except (RuntimeError, UserWarning) as error:  # waits for the device, or memory is short
            self._fall_back(str(error))
            return False
        if drawn:
            self._give_up("the model draws from a random generator on the CPU")
            return False
        mark_own_nodes(self._parameters())
        self._graph = graph
        # Those with a gradient come first, so that a look at one tells whether they were replaced.
        grads = [(parameter, parameter.grad) for parameter in self._parameters()]
        self._grads = sorted(grads, key=lambda pair: pair[1] is None)
        return True

    def _parameters(self) -> list[Tensor]:
        return parameters_of(self._model, self._optimizer)

    def _fall_back(self, why: str) -> None:
        self._possible = False
        warn(
            f"The training step could not be captured as a CUDA graph, so its operations are "
            f"launched one by one, which is slower: {why}. Pass `cuda_graph=False` to `fit` to "
            f"train like this without a warning."
        )

    def _give_up(self, why: str) -> None:
        self._possible = False
        self._tell(why)

    def _tell(self, why: str) -> None:
        if why not in self._told:
            self._told.add(why)
            logger.info("steps are not captured as a CUDA graph: %s", why)
