"""One optimizer step on a batch, as fast as the device allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drophot._core.classifier import logits_of
from drophot._core.onednn_linear import fast_linear
from drophot.training.cuda_graph import CapturedStep, can_be_captured, is_torch_optimizer
from drophot.training.loss import Loss, training_loss

Step = Callable[..., Tensor]


@contextmanager
def fast_step(
    model: nn.Module,
    optimizer: Optimizer,
    device: torch.device,
    *,
    loss: Loss | None = None,
    before_step: Callable[[nn.Module], object] | None = None,
    lr_changes: bool = False,
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

    Yields:
        The step. It never waits for the device. Its logits `(B, C)` have no gradient.
    """
    forward = fast_forward(model, device)

    def backward(inputs: Tensor, targets: Tensor, *weights: Tensor) -> Tensor:
        logits = logits_of(model, forward, inputs)
        mean = training_loss(loss, logits, targets, *weights)
        optimizer.zero_grad()
        mean.backward()
        return logits.detach()

    def update() -> None:
        if before_step is not None:
            before_step(model)
        optimizer.step()

    def eager(*batch: Tensor) -> Tensor:
        logits = backward(*batch)
        update()
        return logits

    with _fused(model, optimizer, device):
        if device.type == "cuda" and can_be_captured(model, optimizer, loss):
            whole = before_step is None and not lr_changes
            yield CapturedStep(
                backward, update, model, optimizer, loss, device, update_is_captured=whole
            )
        else:
            yield eager


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
    forward = fast_linear(model, device) if _uses_onednn.get() else model
    if not torch.is_autocast_enabled(device.type):
        return forward
    dtype = torch.get_autocast_dtype(device.type)

    def mixed(inputs: Tensor) -> Tensor:
        # A surrounding autocast caches the cast weights until it ends: without an autocast of its
        # own, the next step would not see what this one has learned.
        with torch.autocast(device.type, dtype, cache_enabled=False):
            return forward(inputs)

    return mixed


@contextmanager
def _fused(model: nn.Module, optimizer: Optimizer, device: torch.device) -> Iterator[None]:
    """Let torch's own optimizers update all parameters at once, unless the user chose otherwise."""
    before = [{name: group.get(name) for name in _SWITCHES} for group in optimizer.param_groups]
    moved_counters = False
    if is_torch_optimizer(optimizer) and not any(
        getattr(module, "sparse", False) for module in model.modules()
    ):
        # Older versions of torch refuse a fused Adagrad on a GPU. Other devices are untested.
        supported = device.type == "cpu" or (
            device.type == "cuda" and not isinstance(optimizer, torch.optim.Adagrad)
        )
        for group in optimizer.param_groups:
            chosen = [group.get(name, False) for name in ("fused", "foreach", "differentiable")]
            real = all(p.is_floating_point() for p in group["params"])
            if chosen == [None, None, False] and real and supported:
                group["fused"] = True
            if "capturable" in group and device.type == "cuda":
                moved_counters = moved_counters or not group["capturable"]
                group["capturable"] = True
                for state in optimizer.state.values():
                    for name in _COUNTERS & state.keys():
                        state[name] = torch.as_tensor(state[name], device=device)
    try:
        yield
    finally:
        # Parameter groups may have been added in the meantime.
        for group, values in zip(optimizer.param_groups, before, strict=False):
            group.update({name: values[name] for name in _SWITCHES if name in group})
        if moved_counters:
            _move_counters_to_cpu(optimizer)


_SWITCHES = ("fused", "capturable")
_COUNTERS = {"step", "mu_product"}  # kept on the CPU by optimizers that are not capturable


def _move_counters_to_cpu(optimizer: Optimizer) -> None:
    """Put counters where optimizers that are not capturable keep them and read them."""
    for group in optimizer.param_groups:
        if not group.get("capturable") and not group.get("fused"):
            for state in (optimizer.state[p] for p in group["params"] if p in optimizer.state):
                for name in _COUNTERS & state.keys():
                    state[name] = state[name].cpu() if torch.is_tensor(state[name]) else state[name]
