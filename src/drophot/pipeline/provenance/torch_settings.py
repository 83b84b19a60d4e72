"""The switches of torch that change what a training computes, wherever it is computed.

Autocast, the default dtype and device, the precision of float32 products, deterministic algorithms
and their like belong to a thread or a process. They are part of a configuration, and a grid sets
them on its workers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from drophot._core.json_values import Json

_TINY = 5e-324
_BY_BACKEND = "by backend"
_FULL = {"none": "ieee"}  # a precision that was never set is the full one


@dataclass(frozen=True, slots=True)
class _Switch:
    default: Any
    get: Callable[[], Any]
    set: Callable[[Any], object]


def changed_switches(device: torch.device) -> dict[str, Json]:
    """The switches that differ from torch's defaults, by name, as JSON can hold them."""
    found = {name: switch.get() for name, switch in _SWITCHES.items()}
    changed = {
        name: value
        for name, value in found.items()
        if value not in (_SWITCHES[name].default, _BY_BACKEND)
    }
    if (default := str(torch.get_default_device())) != "cpu":
        changed["default_device"] = default
    for kind in _kinds(device):
        if (dtype := _autocast(kind)) is not None:
            changed[f"autocast_{kind}"] = dtype
    return changed


@contextmanager
def with_switches(found: Mapping[str, Json], device: torch.device) -> Generator[None]:
    """Set all switches to what `changed_switches` found elsewhere, and restore them afterwards."""
    before = {name: switch.get() for name, switch in _SWITCHES.items()}
    try:
        _turn({name: found.get(name, switch.default) for name, switch in _SWITCHES.items()})
        with ExitStack() as stack:
            if (default := found.get("default_device", "cpu")) != str(torch.get_default_device()):
                stack.enter_context(torch.device(str(default)))
            for kind in _kinds(device):
                if (dtype := found.get(f"autocast_{kind}")) != _autocast(kind):
                    enabled = dtype is not None
                    of = getattr(torch, str(dtype)) if enabled else None
                    stack.enter_context(torch.autocast(kind, dtype=of, enabled=enabled))
            yield
    finally:
        _turn(before)


def _turn(values: Mapping[str, Any]) -> None:
    for name, value in values.items():  # in the table's order: one may set others too
        if _SWITCHES[name].get() != value:
            _SWITCHES[name].set(value)


def _kinds(device: torch.device) -> list[str]:
    return sorted({"cpu", "cuda", device.type})


def _autocast(kind: str) -> str | None:
    if not torch.is_autocast_enabled(kind):
        return None
    return str(torch.get_autocast_dtype(kind)).removeprefix("torch.")


def _deterministic() -> str:
    if not torch.are_deterministic_algorithms_enabled():
        return "no"
    return "warn" if torch.is_deterministic_algorithms_warn_only_enabled() else "yes"


def _older(get: Callable[[], Any]) -> Callable[[], Any]:
    """An older switch, which cannot be read where the newer ones by backend were used."""

    def value() -> Any:
        try:
            return get()
        except RuntimeError:
            return _BY_BACKEND

    return value


def _flushes_denormals() -> bool:
    return _TINY * 1.0 == 0.0  # the thread's own, for torch and Python


def _backend(path: str, default: Any) -> dict[str, _Switch]:
    """A setting of `torch.backends`, where this torch has it."""
    parent, _, name = path.rpartition(".")
    try:
        owner: Any = operator.attrgetter(parent)(torch.backends) if parent else torch.backends
        getattr(owner, name)
    except (AttributeError, RuntimeError):
        return {}

    def value() -> Any:
        return _FULL.get(found := getattr(owner, name), found)

    return {
        path.replace(".", "_"): _Switch(default, value, lambda value: setattr(owner, name, value))
    }


def _by_backend(defaults: Mapping[str, object]) -> dict[str, _Switch]:
    return {
        name: switch
        for path, default in defaults.items()
        for name, switch in _backend(path, default).items()
    }


def _attention(name: str) -> dict[str, _Switch]:
    get = getattr(torch.backends.cuda, f"{name}_sdp_enabled", None)
    if get is None:
        return {}
    return {
        f"{name}_attention": _Switch(True, get, getattr(torch.backends.cuda, f"enable_{name}_sdp"))
    }


# In this order: the first are for all operations that have no precision of their own.
_PRECISIONS = {
    f"{backend}fp32_precision": default
    for default, backends in (
        ("ieee", ("", "cudnn.", "mkldnn.", "cuda.matmul.")),
        ("tf32", ("cudnn.conv.", "cudnn.rnn.")),
        ("ieee", ("mkldnn.matmul.", "mkldnn.conv.", "mkldnn.rnn.")),
    )
    for backend in backends
}
_SWITCHES: dict[str, _Switch] = {
    "default_dtype": _Switch(
        "float32",
        lambda: str(torch.get_default_dtype()).removeprefix("torch."),
        lambda name: torch.set_default_dtype(getattr(torch, name)),
    ),
    "deterministic_algorithms": _Switch(
        "no",
        _deterministic,
        lambda how: torch.use_deterministic_algorithms(how != "no", warn_only=how == "warn"),
    ),
    "flush_denormal": _Switch(False, _flushes_denormals, torch.set_flush_denormal),
    "float32_matmul_precision": _Switch(
        "highest",
        _older(torch.get_float32_matmul_precision),
        lambda value: value == _BY_BACKEND or torch.set_float32_matmul_precision(value),
    ),
    "cudnn_allow_tf32": _Switch(
        True,
        _older(lambda: torch.backends.cudnn.allow_tf32),
        lambda value: value == _BY_BACKEND or setattr(torch.backends.cudnn, "allow_tf32", value),
    ),
    **_by_backend(_PRECISIONS),
    **_by_backend({
        "cuda.matmul.allow_fp16_reduced_precision_reduction": True,
        "cuda.matmul.allow_bf16_reduced_precision_reduction": True,
        "cuda.matmul.allow_fp16_accumulation": False,
        "cudnn.enabled": True,
        "cudnn.benchmark": False,
        "mkldnn.enabled": True,
        "mkldnn.deterministic": False,
    }),
    **_attention("flash"),
    **_attention("mem_efficient"),
    **_attention("math"),
    **_attention("cudnn"),
}
