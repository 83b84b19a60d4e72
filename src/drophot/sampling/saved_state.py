"""The saved state of a sampler, read with checks, so that a damaged one changes nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import inf
from typing import Any

import torch
from torch import Tensor


class SavedState:
    """The values of a state; each is checked when it is read.

    Args:
        values: The state.
        label: The expression for it in errors.
    """

    def __init__(self, values: Any, label: str = "state_dict") -> None:
        self.label = label
        if not isinstance(values, Mapping):
            raise self._error(None, "a dictionary, as `state_dict()` returns it", values)
        self.values: Mapping[str, Any] = values

    def check_names(self, names: Collection[str], kind: str) -> None:
        """Refuse a state that has not exactly these names."""
        wanted, found = set(names), set(map(str, self.values))
        if different := wanted ^ found:
            word = "without" if wanted - found else "with"
            raise ValueError(
                f"`{self.label}` must be that of a {kind}, got one {word} "
                f"{', '.join(sorted(wanted - found or different))}. Load it into an object of the "
                f"class that saved it."
            )

    def part(self, name: str) -> SavedState:
        """A dictionary in the state."""
        return SavedState(self.values[name], f'{self.label}["{name}"]')

    def integer(self, name: str, least: int = 0, most: float = inf) -> int:
        """An integer from `least` to `most`."""
        value = self.values[name]
        if not _is_integer(value) or not least <= value <= most:
            upper = "" if most == inf else f" and at most {most}"
            raise self._error(name, f"an integer of at least {least}{upper}", value)
        return value

    def real(self, name: str, least: float = -inf) -> float:
        """A number of at least `least`, which may be NaN if there is no such limit."""
        value = self.values[name]
        number = _is_integer(value) or isinstance(value, float)
        if not number or (least > -inf and not least <= value < inf):
            limit = f" of at least {least:g}" if least > -inf else ""
            raise self._error(name, f"a number{limit}", value)
        return value

    def tensor(self, name: str, shape: tuple[int | None, ...]) -> Tensor:
        """Floats of some shape, of which `None` stands for any size."""
        value = self.values[name]
        return self.checked_tensor(name, value, shape)

    def weights(self, name: str, shape: tuple[int | None, ...]) -> Tensor:
        """Floats that are finite and not negative."""
        value = self.tensor(name, shape)
        if wrong := value[~(value.isfinite() & (value >= 0))].tolist():
            raise self._error(name, "finite weights of at least 0", wrong[0])
        return value

    def indices(self, name: str, shape: tuple[int | None, ...], num_samples: int) -> Tensor:
        """Indices of samples."""
        value = self.checked_tensor(name, self.values[name], shape, torch.int64)
        if wrong := value[(value < 0) | (value >= num_samples)].tolist():
            raise self._error(name, f"indices in [0, {num_samples})", wrong[0])
        return value

    def checked_tensor(
        self,
        name: str,
        value: Any,
        shape: tuple[int | None, ...],
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """A value that has to be a tensor of a shape and a dtype; `None` is any dtype of floats."""
        words = f"a tensor of {'floats' if dtype is None else dtype}"
        if not isinstance(value, Tensor) or not (
            value.is_floating_point() if dtype is None else value.dtype == dtype
        ):
            raise self._error(name, words, value)
        fits = len(value.shape) == len(shape) and all(
            wanted in (None, size) for wanted, size in zip(shape, value.shape, strict=True)
        )
        if not fits:
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise self._error(name, f"{words} of shape ({sizes})", value)
        return value

    def _error(self, name: str | None, wanted: str, found: Any) -> ValueError:
        if isinstance(found, Tensor):
            found = f"a tensor of {found.dtype} of shape {tuple(found.shape)}"
        elif found is not None and not isinstance(found, int | float | str):
            found = f"a {type(found).__name__}"
        whole = self.label if name is None else f'{self.label}["{name}"]'
        return ValueError(
            f"`{whole}` must be {wanted}, got {found}. The state is damaged; load another one."
        )


def checked_state(
    state_dict: Mapping[str, Any], own: Mapping[str, Any], kind: str, *others: str
) -> SavedState:
    """The state of a sampler with the same settings.

    Args:
        state_dict: The state.
        own: The settings of the sampler, which the state must have. `num_replicas` may differ
            between two epochs.
        kind: The name of the sampler's class, for errors.
        others: The names of everything else that the state has, besides `"yielded"`.
    """
    saved = SavedState(state_dict)
    saved.check_names({*own, *others, "yielded"}, kind)
    within = saved.integer("yielded") > 0
    for name, value in own.items():
        found = state_dict[name]
        if name == "num_replicas" and not within:
            saved.integer(name, least=1)
        elif (
            not isinstance(found, int | float | str)
            or isinstance(found, bool) != isinstance(value, bool)  # since True equals 1
            or found != value
        ):
            raise ValueError(
                f"`state_dict` must be that of a {kind} with {name}={value}, got {name}={found}. "
                f"Create the {kind} with the same arguments."
            )
    return saved


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
