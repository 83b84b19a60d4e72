"""Why layers keep channels, in words that need no knowledge of torch's internals."""

from __future__ import annotations

import re
from collections.abc import Mapping

OUTPUT = "an output of the network"
UNUSED = "the model does not use it with these inputs"
RANKED = "the channels that were removed rank lower, or `min_kept` and `round_to` allow no more"
ONE = "at least one channel is kept"
NOT_PRODUCED = "no Conv or Linear layer or attention projection produces these channels"
VALUES = "the values differ from those of the network in which these channels are zero"

# The operators that torch calls, and what users call them.
WORDS = {
    **dict.fromkeys(("view", "unsafe_view", "reshape", "reshape_alias", "clone"), "a reshape"),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "matmul", "mv", "dot"), "a matrix product"),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "chunk"), "a split"),
    **dict.fromkeys(("slice", "select", "index", "narrow", "as_strided"), "indexing"),
    **dict.fromkeys(("copy_", "slice_scatter", "select_scatter"), "an assignment"),
    **dict.fromkeys(("zeros", "ones", "full", "empty", "new_zeros", "new_ones"), "a new tensor"),
    **dict.fromkeys(("new_full", "new_empty", "arange", "scalar_tensor"), "a new tensor"),
    **dict.fromkeys(("t", "permute", "transpose"), "a transposition"),
    **dict.fromkeys(("convolution", "slow_conv3d_forward"), "a convolution"),
    **dict.fromkeys(("softmax", "safe_softmax", "log_softmax"), "a softmax"),
    "native_layer_norm": "layer normalization",
    "native_group_norm": "group normalization",
    "native_batch_norm": "batch normalization",
    "native_batch_norm_legit": "batch normalization",
    "fused_rms_norm": "RMS normalization",
    **dict.fromkeys(("constant_pad_nd", "reflection_pad2d", "replication_pad2d"), "padding"),
    **dict.fromkeys(("cdist_forward", "euclidean_dist"), "`cdist`"),
    **dict.fromkeys(("fft_r2c", "fft_c2c", "fft_c2r"), "a Fourier transform"),
    "sparse_addmm": "a matrix product",
    "im2col": "`unfold`",
    "col2im": "`fold`",
    "to_copy": "a conversion",
    "add": "an addition",
    "sub": "a difference",
    "mul": "a product",
    "div": "a quotient",
    "cat": "a concatenation",
    "unsqueeze": "a new dimension",
    "max_pool2d_with_indices": "max_pool2d",
}


def inside(path: str) -> str:
    """The name of a module in a sentence."""
    return f"`{path}`" if path else "the model's own forward"


def operation(name: str) -> str:
    """The name of an operator in a sentence."""
    name = name.removeprefix("_")
    return WORDS.get(name) or WORDS.get(name.removesuffix("_")) or f"`{name.removesuffix('_')}`"


def why_kept(name: str, path: str, why: str) -> str:
    """Why channels are kept: the operator, the module that calls it and what a pass found."""
    if why == VALUES:
        return f"with fewer channels {operation(name)} in {inside(path)} gives other values"
    if why == "size":
        return f"{operation(name)} in {inside(path)} has a fixed size"
    if why.startswith("code: "):
        return f"the code of {inside(path)} {why.removeprefix('code: ')}"
    return f"{operation(name)} in {inside(path)}: {why}"


_MODULE = re.compile(r"\b(in|of) (`[^`]+`)")


def module_in(why: str) -> str:
    """The path of the module that a reason of `why_kept` names; empty if it names none."""
    found = _MODULE.search(why)
    return found[2].strip("`") if found else ""


def merged(counts: Mapping[str, int]) -> list[tuple[int, str]]:
    """Numbers of channels and reasons, the largest first; reasons that differ by module are one."""
    found: dict[str, tuple[int, list[str]]] = {}
    for why, count in counts.items():
        module = _MODULE.search(why)
        key = why if module is None else f"{why[: module.start(2)]}{{}}{why[module.end(2) :]}"
        total, modules = found.setdefault(key, (0, []))
        found[key] = total + count, modules + ([module[2]] if module else [])
    lines = []
    for key, (total, modules) in found.items():
        more = f" and {len(modules) - 2} more" if len(modules) > 2 else ""
        lines.append((total, key.replace("{}", ", ".join(modules[:2]) + more) if modules else key))
    return sorted(lines, key=lambda line: -line[0])
