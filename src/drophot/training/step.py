"""One optimiser step on a batch, as fast as the device allows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from drophot._core import random_state
from drophot._core.classifier import check_loss, logits_of
from drophot._core.model_contexts import evaluating
from drophot._core.onednn_linear import fast_linear

logger = logging.getLogger("drophot")

_WARM_UP = 3  # plain steps before one is captured: libraries choose their algorithms there

Step = Callable[..., Tensor]


@contextmanager
def fast_step(model: nn.Module, optimizer: Optimizer, device: torch.device) -> Iterator[Step]:
    """A step of training with cross-entropy: `step(inputs, targets)` gives the logits.

    `step(inputs, targets, weights)` takes the mean of the losses times the weights `(B,)`.

    The optimiser works on all parameters at once (`fused`); on a CPU large linear layers go to the
    faster library; on a GPU the step is captured once as a CUDA graph and then repeated by one
    launch. Logits and targets that do not go together are refused before the weights change.

    Args:
        model: In training mode.
        optimizer: Holds the model's parameters. Its settings come back as they were.
        device: Where the model is.

    Yields:
        The step. It never waits for the device. Its logits `(B, C)` need no gradient.
    """
    forward = fast_forward(model, device)

    def plain(inputs: Tensor, targets: Tensor, *weights: Tensor) -> Tensor:
        logits = logits_of(model, forward, inputs)
        check_loss(logits, targets)
        optimizer.zero_grad()
        if weights:
            (F.cross_entropy(logits, targets, reduction="none") * weights[0]).mean().backward()
        else:
            F.cross_entropy(logits, targets).backward()
        optimizer.step()
        return logits.detach()

    with _fused(model, optimizer, device):
        if device.type == "cuda" and _can_be_captured(model, optimizer):
            yield _Captured(plain, optimizer, device)
        else:
            yield plain


def fast_forward(model: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A model's forward pass, in the mixed precision of the surrounding `torch.autocast`, if any.

    Args:
        model: The model.
        device: Where it is.

    Returns:
        To be called as the model is.
    """
    forward = fast_linear(model, device)
    if not torch.is_autocast_enabled(device.type):
        return forward
    dtype = torch.get_autocast_dtype(device.type)

    def mixed(inputs: Tensor) -> Tensor:
        # A surrounding autocast keeps cast weights until it ends: the next step would not see
        # what this one has learned.
        with torch.autocast(device.type, dtype, cache_enabled=False):
            return forward(inputs)

    return mixed


def takes_channels_last(model: nn.Module, inputs: Tensor) -> bool:
    """Whether images may be given with their channels last in memory, as convolutions like them.

    Args:
        model: Comes back as it was.
        inputs: A few inputs, on the model's device.

    Returns:
        Whether the model has convolutions, and nothing in it asks for another order in memory.
    """
    if inputs.dim() != 4 or not any(p.dim() == 4 for p in model.parameters()):
        return False
    weights = [p for p in model.parameters() if p.requires_grad]
    with evaluating(model), torch.enable_grad():
        try:
            logits = model(inputs.to(memory_format=torch.channels_last))
            if logits.requires_grad:
                torch.autograd.grad(logits.float().sum(), weights, allow_unused=True)
        except RuntimeError:  # "view size is not compatible with input tensor's size and stride"
            return False
    return True


@contextmanager
def _fused(model: nn.Module, optimizer: Optimizer, device: torch.device) -> Iterator[None]:
    """Let torch's own optimisers update all parameters at once, where nobody chose otherwise."""
    before = [{name: group.get(name) for name in _SWITCHES} for group in optimizer.param_groups]
    counted = False
    if _is_torchs(optimizer) and not any(getattr(m, "sparse", False) for m in model.modules()):
        # Older versions of torch refuse a fused Adagrad on a GPU; other devices were not tried.
        known = device.type == "cpu" or (
            device.type == "cuda" and not isinstance(optimizer, torch.optim.Adagrad)
        )
        for group in optimizer.param_groups:
            chosen = [group.get(name, False) for name in ("fused", "foreach", "differentiable")]
            real = all(p.is_floating_point() for p in group["params"])
            if chosen == [None, None, False] and real and known:
                group["fused"] = True
            if "capturable" in group and device.type == "cuda":
                counted = counted or not group["capturable"]
                group["capturable"] = True
                for state in optimizer.state.values():
                    for name in _COUNTERS & state.keys():
                        state[name] = torch.as_tensor(state[name], device=device)
    try:
        yield
    finally:
        # Groups may have joined in the meantime.
        for group, values in zip(optimizer.param_groups, before, strict=False):
            group.update({name: values[name] for name in _SWITCHES if name in group})
        if counted:
            _count_on_the_cpu(optimizer)


_SWITCHES = ("fused", "capturable")
_COUNTERS = {"step", "mu_product"}  # what optimisers keep on the CPU, unless they are capturable


def _count_on_the_cpu(optimizer: Optimizer) -> None:
    """Where an optimiser that is not capturable has its counters, and reads them at each step."""
    for group in optimizer.param_groups:
        if not group.get("capturable") and not group.get("fused"):
            for state in (optimizer.state[p] for p in group["params"] if p in optimizer.state):
                for name in _COUNTERS & state.keys():
                    state[name] = state[name].cpu() if torch.is_tensor(state[name]) else state[name]


def _is_torchs(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim.")


def _can_be_captured(model: nn.Module, optimizer: Optimizer) -> bool:
    """Whether all that a step changes is on the device, so that a graph repeats all of it."""
    plain = isinstance(optimizer, torch.optim.SGD)
    known = all(plain or group.get("capturable") for group in optimizer.param_groups)
    # A hook is Python, such as that of a tracker, and would be called once.
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    hooked = any(getattr(module, kind) for module in model.modules() for kind in kinds)
    return _is_torchs(optimizer) and known and not hooked


def _value(setting: Any) -> Any:
    """A number from a tensor on the CPU, such as a learning rate, which may change in place."""
    return setting.tolist() if isinstance(setting, Tensor) and setting.is_cpu else setting


class _Captured:
    """Repeats a step on a GPU by one launch (a CUDA graph) once it has been taken a few times.

    Batches of another shape, as the last of an epoch, are plain steps; so are the next few after a
    change of what a graph would not see: the optimiser's settings, state and hooks, and which
    parameters are trained. A model that has hooks of its own, draws from Python's or NumPy's
    generator, or waits for the device, stays plain. What else a forward pass does in Python, such
    as to count its calls, happens once.
    """

    def __init__(self, plain: Step, optimizer: Optimizer, device: torch.device) -> None:
        self._plain = plain
        self._optimizer = optimizer
        self._device = device
        self._side = torch.cuda.Stream(device)
        self._settings: Any = None
        self._shape: Any = None
        self._steps = 0
        self._possible = True
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *batch: Tensor) -> Tensor:
        shape = [tensor.shape for tensor in batch]
        self._shape = self._shape or shape
        if not self._possible or shape != self._shape:
            return self._plain(*batch)
        if self._fixed() != self._settings:
            self._steps, self._graph = 0, None
        if self._steps < _WARM_UP:
            self._steps += 1
            logits = self._aside(batch)
            self._settings = self._fixed()  # the first step makes the optimiser's averages
            return logits
        if self._graph is None and not self._capture(batch):
            return self._plain(*batch)
        for held, new in zip(self._batch, batch, strict=True):
            held.copy_(new)
        self._graph.replay()  # type: ignore[union-attr]
        return self._logits.clone()

    def _fixed(self) -> list[Any]:
        """What a graph takes as it is when it is captured, and would not see change."""
        optimizer, fixed = self._optimizer, []
        for group in optimizer.param_groups:
            fixed += [(p.requires_grad, p.data_ptr()) for p in group["params"]]
            fixed += [_value(group[name]) for name in group if name != "params"]
        averages = [id(value) for state in optimizer.state.values() for value in state.values()]
        hooks = [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]
        return fixed + averages + hooks

    def _aside(self, batch: tuple[Tensor, ...]) -> Tensor:
        """A plain step on another stream, as what is captured later has to be prepared."""
        current = torch.cuda.current_stream(self._device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            logits = self._plain(*batch)
        current.wait_stream(self._side)
        return logits

    def _capture(self, batch: tuple[Tensor, ...]) -> bool:
        self._batch = [tensor.clone() for tensor in batch]
        graph = torch.cuda.CUDAGraph()
        before = random_state.state()
        try:
            with random_state.preserved_rng():
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self._logits = self._plain(*self._batch)
                self._possible = random_state.state() == before
        except RuntimeError as error:  # it waited for the device, or there is no memory for it
            logger.info("steps are not captured as a CUDA graph: %s", error)
            self._possible = False
        if self._possible:
            self._graph = graph
        return self._possible
