"""Warn about matrices that stay dense because drophot does not know their layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

from drophot._core.user_warnings import warn
from drophot.prune.linear_layers import is_matrix, packed_weights, weights_of
from drophot.prune.prunable_weights import joined, left_out

# If at most this share stays dense, the share of all matrix weights that is removed is less than
# one percentage point below the ratio.
_NEGLIGIBLE = 0.01
_NUM_SHOWN = 3

_silenced: ContextVar[bool] = ContextVar("_silenced", default=False)


@contextmanager
def uncovered_warning_silenced(silenced: bool = True) -> Iterator[None]:
    """Suppress the warning of `warn_of_uncovered`, which is given elsewhere, if `silenced`."""
    token = _silenced.set(silenced or _silenced.get())
    try:
        yield
    finally:
        _silenced.reset(token)


def uncovered(
    model: nn.Module, weights: Mapping[str, nn.Parameter], skip: Iterable[str] = ()
) -> dict[str, tuple[int, str]]:
    """The matrices that are neither pruned nor skipped: their sizes and what they are, by name."""
    without = left_out(model, skip)
    seen = {id(weight) for weight in weights.values()}
    found: dict[str, tuple[int, str]] = {}
    for path, module in model.named_modules():
        kind = type(module).__name__
        for attribute, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen or id(parameter) in without:
                continue
            seen.add(id(parameter))
            name = joined(path, attribute)
            if is_matrix(model, name, parameter):
                computed = attribute in weights_of(module)
                why = f"{kind}, whose forward may not keep its zeros" if computed else kind
                found[name] = parameter.numel(), why
        if path not in without:
            packed = packed_weights(module)
            found |= {joined(path, name): (n, f"{kind}, packed") for name, n in packed.items()}
    return found


def warn_of_uncovered(
    model: nn.Module, weights: Mapping[str, nn.Parameter], skip: Iterable[str] = ()
) -> None:
    """Warn with the names of the matrices that stay dense, if they hold more than 1 % of all."""
    if _silenced.get():
        return
    found = uncovered(model, weights, skip)
    left = sum(number for number, _ in found.values())
    share = left / (left + sum(weight.numel() for weight in weights.values()))
    if share <= _NEGLIGIBLE:
        return
    shown = ", ".join(f"`{name}` ({why})" for name, (_, why) in list(found.items())[:_NUM_SHOWN])
    more = f" and {len(found) - _NUM_SHOWN:,} more" if len(found) > _NUM_SHOWN else ""
    warn(
        f"{share:.1%} of the model's matrix weights, embeddings not counted, stay dense, since "
        f"drophot does not know how they are used: {shown}{more}. The ratio is a share of the "
        f"other weights. To prune these too, pass their names or those of their modules in "
        f"`include`. To leave them dense without this warning, pass them in `skip`."
    )
