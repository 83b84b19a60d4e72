"""FLOP formulas for operators that torch's counter lacks, and operators that cost nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod
from typing import Any

from torch import Tensor

# Multiply-adds, of two operations each, of operators that torch's counter has no formula for.
_MULTIPLY_ADDS: dict[str, Callable[..., int]] = {
    "mv": lambda a, b: a.numel(),
    "addmv": lambda c, a, b, **_: a.numel(),
    "dot": lambda a, b: a.numel(),
    "vdot": lambda a, b: a.numel(),
    "addbmm": lambda c, a, b, **_: a.numel() * b.shape[2],
    "_int_mm": lambda a, b: a.numel() * b.shape[1],
    "_trilinear": lambda *args, **_: _trilinear(*args),
    "_grouped_mm": lambda a, b, offs=None, *_, **__: _grouped(a, b, offs),
    # Each recurrent weight is used at each step of each sequence, a row of a packed input.
    "mkldnn_rnn_layer": lambda x, ih, hh, *_, **__: _recurrent(x, [ih, hh]),
    "_cudnn_rnn": lambda x, weights, *_, **__: _recurrent(x, weights),
    "miopen_rnn": lambda x, weights, *_, **__: _recurrent(x, weights),
    "_scaled_dot_product_flash_attention_for_cpu": lambda q, k, v, *_, **__: _attention(q, k, v),
    "_scaled_dot_product_fused_attention_overrideable": (
        lambda q, k, v, *_, **__: _attention(q, k, v)
    ),
    "_scaled_dot_product_attention_math_for_mps": lambda q, k, v, *_, **__: _attention(q, k, v),
}
# Words in the names of torch's operators that consist of products. If such an operator has no
# formula, its cost is unknown. Others (elementwise, pooling, copies) count as nothing.
_PRODUCTS = frozenset([
    *("conv", "conv1", "conv2", "conv3", "convolution", "rnn", "lstm", "gru"),
    *("mm", "addmm", "bmm", "baddbmm", "mv", "matmul", "gemm", "smm", "hspmm", "sspaddmm"),
    *("spmm", "linear", "attention", "mha", "transformer", "trilinear", "fft", "cdist"),
    *(
        "pdist",
        "linalg",
        "eig",
        "eigh",
        "svd",
        "qr",
        "geqrf",
        "orgqr",
        "ormqr",
        "cholesky",
        "lstsq",
        "solve",
        "inverse",
    ),
])
_EXCEPTIONS = re.compile(
    r"upsample_|_thnn_fused_|.*flatten_weight|.*reorder|linalg_vector_norm|linalg_cross"
    r"|_linalg_check_errors|_fused_sdp_choice"
)
# Operators of other libraries whose torch counterparts count as nothing.
_FREE = re.compile(
    r"prims?\.|profiler\.|_?c10d|torchvision\.(nms|(ps_)?roi_(align|pool))|rngprims\.|image\."
)


def multiply_adds(name: str) -> Callable[..., int] | None:
    """The formula for an operator of torch, as a function of its arguments, or `None`."""
    return _MULTIPLY_ADDS.get(name.removeprefix("aten.")) if name.startswith("aten.") else None


def is_free(name: str) -> bool:
    """Whether an operator without a formula counts as nothing; otherwise its cost is unknown."""
    if not name.startswith("aten."):
        return _FREE.match(name) is not None
    name = name.removeprefix("aten.")
    if _EXCEPTIONS.match(name):
        return True
    return _PRODUCTS.isdisjoint(re.split(r"_+|(?<=[a-z]\d)(?=[a-z])|(?<=conv)(?=_)", name))


def _attention(q: Tensor, k: Tensor, v: Tensor) -> int:
    return prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _recurrent(x: Tensor, weights: Any) -> int:
    return prod(x.shape[:-1]) * sum(w.numel() for w in weights if w.dim() == 2)


def _trilinear(a: Tensor, b: Tensor, c: Tensor, *expand: list[int]) -> int:
    shapes = []
    for tensor, dims in zip((a, b, c), expand[:3], strict=True):
        shape = list(tensor.shape)
        for dim in dims:
            shape.insert(dim, 1)
        shapes.append(shape)
    return prod(max(sizes) for sizes in zip(*shapes, strict=True))


def _grouped(a: Tensor, b: Tensor, offs: Tensor | None) -> int:
    last = 0 if offs is None or not offs.numel() else int(offs[-1])
    if a.dim() == b.dim() == 3:
        return a.numel() * b.shape[2]
    if a.dim() == 2 and b.dim() == 3:
        return last * a.shape[1] * b.shape[2]
    if a.dim() == 3:
        return a.shape[1] * a.shape[2] * last
    return a.shape[0] * last * b.shape[1]
