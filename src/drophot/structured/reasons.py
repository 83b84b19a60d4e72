"""Why layers keep channels, in words that do not ask for knowledge of torch's inside."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from drophot.structured.channel_groups import Pools
from drophot.structured.dependency_graph import Axis, Ties

OUTPUT = "an output of the network"
VALUES = "the values are not those of the network where these channels are zero"

# What torch calls inside, and what a user writes or thinks of.
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
    "native_layer_norm": "layer normalisation",
    "native_group_norm": "group normalisation",
    "native_batch_norm": "batch normalisation",
    "native_batch_norm_legit": "batch normalisation",
    "fused_rms_norm": "RMS normalisation",
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
    """A module as a user finds it."""
    return f"`{path}`" if path and path != "the model" else "the model's own forward"


def operation(name: str) -> str:
    """An operator as a user knows it."""
    name = name.removeprefix("_")
    return WORDS.get(name) or WORDS.get(name.removesuffix("_")) or f"`{name.removesuffix('_')}`"


def why_whole(name: str, path: str, why: str) -> str:
    """Why channels stay that a call does not do without.

    Args:
        name: The operator's.
        path: The module that it is called in.
        why: What was seen.

    Returns:
        The reason.
    """
    if why == VALUES:
        return f"with fewer channels {operation(name)} in {inside(path)} gives other values"
    if why == "size":
        return f"{operation(name)} in {inside(path)} is of a fixed size"
    if why.startswith("code: "):
        return f"the code of {inside(path)} {why.removeprefix('code: ')}"
    return f"{operation(name)} in {inside(path)}: {why}"


_PLACE = re.compile(r"\b(in|of) (`[^`]+`)")


def together(counts: Mapping[str, int]) -> list[tuple[int, str]]:
    """Reasons that differ by the module only, as one; those of most channels first.

    Args:
        counts: Channels, by the reason.

    Returns:
        Channels and reasons.
    """
    found: dict[str, tuple[int, list[str]]] = {}
    for why, count in counts.items():
        place = _PLACE.search(why)
        key = why if place is None else f"{why[: place.start(2)]}{{}}{why[place.end(2) :]}"
        total, places = found.setdefault(key, (0, []))
        found[key] = total + count, places + ([place[2]] if place else [])
    lines = []
    for key, (total, places) in found.items():
        more = f" and {len(places) - 2} more" if len(places) > 2 else ""
        lines.append((total, key.replace("{}", ", ".join(places[:2]) + more) if places else key))
    return sorted(lines, key=lambda line: -line[0])


_CALL = re.compile(r"(?P<what>the kernel of )?(?P<name>\w+) in (?P<path>[\w.]+|the model)")


def plain(reason: str) -> str:
    """A reason of a rule, which names an operator and a module, as a user would say it."""
    found = _CALL.fullmatch(reason)
    if found is None:
        return reason
    if found["what"]:
        return f"the kernel's size in {inside(found['path'])}"
    return f"{operation(found['name'])} in {inside(found['path'])} needs all of them"


def reasons(
    ties: Ties,
    pools: Pools,
    gone: Tensor,
    outputs: Mapping[str, list[Axis]],
    ratio: float,
) -> tuple[dict[str, str], dict[str, str]]:
    """Why layers keep all of their channels, or more of them than was asked.

    Args:
        ties: What the forward pass said.
        pools: The channels.
        gone: The entries that are gone.
        outputs: The axes of the layers' outputs, by the weight's name.
        ratio: The share asked for.

    Returns:
        Reasons by the weight's name: of layers that are whole, and of all others.
    """
    none = len(ties.fixed) + 1
    first = torch.full((len(pools.stays),), none)
    for number, (why, ids) in enumerate(ties.fixed):
        channels = pools.channel[ids]
        rank = 0 if why == OUTPUT else number + 1  # which says more than how it gets there
        first[channels] = first[channels].clamp(max=rank)
    words = [OUTPUT, *(plain(why) for why, _ in ties.fixed)]
    whole, part = {}, {}
    for name, axes in outputs.items():
        if not axes:
            whole[name] = "it is not used with these inputs"
        for axis in axes:
            ids = axis.ids.reshape(-1)
            channels = pools.channel[ids]
            stays = first[channels[~gone[ids]]]
            own = pools.pool[channels]
            size = int((pools.pool == own[0]).sum())
            step = pools.multiples.get(size, 1)
            if len(stays) and int(stays.min()) < none:
                why = words[int(stays.min())]
            elif len(channels.unique()) == 1 < len(ids):
                why = "all of its channels have to go together, or none"
            elif step > 1:
                why = f"channels have to go {step} at a time, one for each head"
            elif ratio * size < 0.5 or size == 1:
                why = f"{ratio:.3g} of {size} {_channels(size)} less than one"
            else:
                why = "as many as the layers, heads or groups that they go with allow"
            (part if gone[ids].any() else whole)[name] = why
    return whole, part


def _channels(size: int) -> str:
    return "channel is" if size == 1 else "channels is"
