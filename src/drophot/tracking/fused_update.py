"""`update` on a GPU as one launch, for batches that the Triton kernel can take."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from drophot.tracking.state import State, to_device

logger = logging.getLogger("drophot")

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Each row of the batch reads the index of every row. The plain operations sort a larger batch.
_MAX_ROWS = 4096

_works: dict[tuple[object, ...], bool] = {}  # whether the kernel of these types could be launched


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The columns of a state that the kernel updates, besides the history.

    `values` has a bit for each column of `statistics.built_in_values` that has one in `"means"`,
    and `squares` a bit for each whose sums of squares are kept.
    """

    values: int = 0
    squares: int = 0
    columns: tuple[str, ...] = ()  # "means", "tails" and the sums of squares in the order of bits


def present(state: State, layout: Layout, index: Tensor, logits: Tensor, targets: Tensor) -> bool:
    """Present a batch, not empty, in one launch.

    Returns whether it was presented. If not, nothing was counted: the kernel does not take such a
    batch, the state is on another device, or the kernel cannot be compiled here or would be
    compiled while a CUDA graph is captured.
    """
    if not _is_supported(index, logits, targets):
        return False
    state.follow(logits.device)
    if state.device != logits.device:
        return False
    arguments = (
        to_device(index, logits.device),
        logits,
        to_device(targets, logits.device),
        state.columns["history"],
        state.targets,
        state.fault,
        [state.columns[name] for name in layout.columns],
        layout.values,
        layout.squares,
    )
    if torch.compiler.is_compiling():
        _OPERATOR(*arguments)
        return True
    kernel = (index.dtype, logits.dtype, targets.dtype, logits.shape[1], logits.device, layout)
    works = _works.get(kernel)
    if works is None and _is_captured(logits):
        return False
    if works is None:
        works = _works[kernel] = _try(arguments)
    elif works:
        _OPERATOR(*arguments)
    return works


def _is_supported(index: Tensor, logits: Tensor, targets: Tensor) -> bool:
    """Whether the kernel can present a batch, judged without reading a value."""
    return (
        _is_gpu(logits)
        and _HAS_TRITON
        and logits.dtype in _DTYPES
        and len(logits) <= _MAX_ROWS
        # The kernel reads memory, where a subclass may have something else than its values.
        and type(index) is type(logits) is type(targets) is Tensor
    )


def _try(arguments: tuple[object, ...]) -> bool:
    """Present the first batch of its types, if the kernel can be compiled."""
    try:
        _OPERATOR(*arguments)
    except Exception as error:  # no C compiler, a GPU that is too old, or another version of Triton
        logger.info("trackers use plain operations, as Triton has failed: %s", error)
        return False
    return True


def _is_gpu(tensor: Tensor) -> bool:
    # ROCm calls its devices "cuda", too. Its compiler may round in another way.
    return tensor.is_cuda and torch.version.hip is None


def _is_captured(tensor: Tensor) -> bool:
    if not torch.cuda.is_available():
        return False
    with torch.cuda.device_of(tensor):  # each device has a current stream
        return torch.cuda.is_current_stream_capturing()


# An operator, so that `torch.compile` takes the launch as it is, and so that it counts as one.
torch.library.define(
    "drophot::present",
    "(Tensor index, Tensor logits, Tensor targets, Tensor(a!) history, Tensor(b!) first_targets, "
    "Tensor(c!) fault, Tensor(d!)[] statistics, int values, int squares) -> ()",
)


@torch.library.impl("drophot::present", "default")
def _present(
    index: Tensor,
    logits: Tensor,
    targets: Tensor,
    history: Tensor,
    first_targets: Tensor,
    fault: Tensor,
    statistics: list[Tensor],
    values: int,
    squares: int,
) -> None:
    from drophot.tracking.fused_kernel import launch  # Triton is not imported before it is needed

    # Triton launches on the current device, which may be another one than that of the tensors.
    with torch.cuda.device_of(logits):
        launch(index, logits, targets, history, first_targets, fault, statistics, values, squares)


@torch.library.register_fake("drophot::present")
def _present_nothing(*_: object) -> None:
    """The operator returns nothing."""


_OPERATOR = torch.ops.drophot.present.default
