"""One optimizer step on a batch, as fast as the device allows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drophot._core.capturable_hooks import memory_written_by
from drophot._core.classifier import logits_of
from drophot._core.onednn_linear import fast_linear
from drophot.training.capture_conditions import obstacle
from drophot.training.cuda_graph import CapturedStep, OnBatch
from drophot.training.fused_optimizer import fused
from drophot.training.loss import Loss, training_loss
from drophot.training.mixed_precision import autocasts, uncached_autocast

logger = logging.getLogger("drophot")


class Step(Protocol):
    """A training step."""

    reports: bool
    """Whether the step calls `on_batch`."""

    def __call__(self, *batch: Tensor, index: Tensor | None = None) -> Tensor:
        """Train on `inputs, targets` or `inputs, targets, weights`, and return the logits."""
        ...

    def inputs_for(self, size: int) -> Tensor | None:
        """Where the inputs of the next batch, of `size` samples, can be written to save a copy."""
        ...


@contextmanager
def fast_step(
    model: nn.Module,
    optimizer: Optimizer,
    device: torch.device,
    *,
    loss: Loss | None = None,
    before_step: Callable[[nn.Module], object] | None = None,
    lr_changes: bool = False,
    cuda_graph: bool = True,
    on_batch: OnBatch | None = None,
) -> Iterator[Step]:
    """A training step: `step(inputs, targets)` updates the model and returns the logits.

    `step(inputs, targets, weights)` minimises the mean of the losses times the weights `(B,)`.

    torch's own optimizers update all parameters in one call (`fused`). On a GPU the step is
    captured as a CUDA graph. Logits and targets that do not match are refused before a weight
    changes.

    Args:
        model: In training mode.
        optimizer: Holds the model's parameters. Its settings are restored at the end.
        device: The model's device.
        loss: `loss(logits, targets)`; `None` means cross-entropy.
        before_step: Called with the model between the backward pass and the optimizer's step.
        lr_changes: Whether the learning rate changes in each step.
        cuda_graph: Whether the step may be captured.
        on_batch: What the caller does with the logits of each step. If a CUDA graph may repeat it,
            the step calls it; otherwise the caller does. Without it, the next step may overwrite
            the logits.

    Yields:
        The step. It never waits for the device. Its logits `(B, C)` have no gradient.
    """
    forward = _forward(model, device)

    def backward(inputs: Tensor, targets: Tensor, *weights: Tensor) -> Tensor:
        with uncached_autocast(device.type):
            logits = logits_of(model, forward, inputs)
            mean = training_loss(loss, logits, targets, *weights)
        optimizer.zero_grad()
        mean.backward()
        return logits.detach()

    def update() -> None:
        if before_step is not None:
            before_step(model)
        optimizer.step()

    with fused(model, optimizer, device), _fresh_weights():
        if device.type != "cuda" or not cuda_graph:
            yield _EagerStep(backward, update)
        elif why := obstacle(model, optimizer, loss):
            logger.info("steps are not captured as a CUDA graph: %s", why)
            yield _EagerStep(backward, update)
        else:
            report = None if memory_written_by(on_batch) is None else on_batch
            yield CapturedStep(
                backward,
                update,
                model,
                optimizer,
                loss,
                device,
                captures_update=before_step is None and not lr_changes,
                report=report,
                keeps_logits=on_batch is not None and report is None,
            )


class _EagerStep:
    reports = False

    def __init__(self, backward: Callable[..., Tensor], update: Callable[[], None]) -> None:
        self._backward, self._update = backward, update

    def __call__(self, *batch: Tensor, index: Tensor | None = None) -> Tensor:
        logits = self._backward(*batch)
        self._update()
        return logits

    def inputs_for(self, size: int) -> Tensor | None:
        return None


@contextmanager
def _fresh_weights() -> Iterator[None]:
    """Let a surrounding autocast, which caches weights, cast the trained weights afterwards."""
    try:
        yield
    finally:
        torch.clear_autocast_cache()


_uses_onednn: ContextVar[bool] = ContextVar("drophot_onednn_linear", default=False)


@contextmanager
def onednn_linear() -> Iterator[None]:
    """Compute large linear layers with oneDNN inside this context, on CPUs with AVX-512.

    On AMD's CPUs, torch computes linear layers with MKL, which uses half the width of AVX-512;
    oneDNN uses all of it. The page on speed in the documentation has the measured gain. Results
    differ in the last bits.

    This is off by default because it calls a private operator of torch
    (`torch.ops.mkldnn._linear_pointwise`), which another version of torch may change. It has no
    effect on other devices and CPUs, or if torch has no such operator.

    `fit`, `evaluate` and :class:`drophot.CrestLoader` use it inside the context, in the same
    thread. A grid's worker processes do not; enter the context in a `fit` of your own there.

    Yields:
        Nothing.

    Example:
        >>> from drophot import evaluate, fit
        >>> from torch.utils.data import TensorDataset
        >>> model = nn.Linear(4, 4)
        >>> data = TensorDataset(torch.eye(4), torch.arange(4))
        >>> with onednn_linear():
        ...     fit(model, data, 20, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
        >>> evaluate(model, data)
        1.0
    """
    token = _uses_onednn.set(True)
    try:
        yield
    finally:
        _uses_onednn.reset(token)


def fast_forward(model: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The model's forward pass, in the precision of the surrounding `torch.autocast`, if any."""
    forward = _forward(model, device)
    if not autocasts(device.type):
        return forward

    def mixed(inputs: Tensor) -> Tensor:
        with uncached_autocast(device.type):
            return forward(inputs)

    return mixed


def _forward(model: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    return fast_linear(model, device) if _uses_onednn.get() else model
