"""A budget: what a network may cost at most after pruning."""

from __future__ import annotations

from dataclasses import dataclass, fields

from drophot._core import scalars

LIMITS = ("parameters", "flops", "bytes", "latency")
UNITS = {"parameters": "parameters", "flops": "FLOPs", "bytes": "bytes", "latency": "ms"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a network may cost at most, for `prune_channels(..., to=Budget(...))`.

    Give at least one of the four limits. If you give several, all of them hold.

    Args:
        parameters: The number of parameters, including biases and norms, as `summary` counts them.
        flops: The operations for the example inputs, two for each multiply-add, as `summary` counts
            them: in proportion to the batch size.
        bytes: The memory of the parameters.
        latency: Milliseconds of one call with the example inputs in evaluation mode, on the model's
            device and with the current number of threads.
        min_kept: The minimum share of each set of channels that is kept, in [0, 1), rounded up. At
            least one channel is kept.
        round_to: If a set loses channels, the number that it keeps is a multiple of this. Matrix
            units of GPUs are fastest with multiples of 8 or 16.
        whole_heads: Whether attention loses whole heads instead of channels of each head.

    Raises:
        TypeError: If a limit is not a number, `round_to` is not an integer, or `whole_heads` is not
            a bool.
        ValueError: If there is no limit, a limit is not positive, `min_kept` is not in [0, 1), or
            `round_to` is less than 1.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from drophot.structured import prune_channels
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> inputs = torch.ones(1, 4)
        >>> pruned = prune_channels(model, example_inputs=inputs, to=Budget(parameters=40))
        >>> pruned.parameters
        Change(before=58, after=37)
    """

    parameters: int | None = None
    flops: float | None = None
    bytes: int | None = None
    latency: float | None = None
    min_kept: float = 0.1
    round_to: int = 1
    whole_heads: bool = False

    def __post_init__(self) -> None:
        if not self.limits:
            raise ValueError(
                "`Budget` must have a limit, got none. Pass `parameters`, `flops`, `bytes` or "
                "`latency`, such as Budget(parameters=1_000_000)."
            )
        for name, limit in self.limits.items():
            found = scalars.real(f"Budget.{name}", limit)
            if not found > 0:
                raise ValueError(
                    f"`Budget.{name}` must be positive, got {limit}. Pass the most {UNITS[name]} "
                    f"that the network may have."
                )
            whole = name != "latency" and found.is_integer()
            object.__setattr__(self, name, int(found) if whole else found)
        found = scalars.real("Budget.min_kept", self.min_kept)
        if not 0 <= found < 1:
            raise ValueError(
                f"`Budget.min_kept` must be in [0, 1), got {self.min_kept}. To keep 10 % of each "
                f"layer, pass 0.1."
            )
        object.__setattr__(self, "min_kept", found)
        multiple = scalars.integer("Budget.round_to", self.round_to, least=1)
        object.__setattr__(self, "round_to", multiple)
        if not isinstance(self.whole_heads, bool):
            raise TypeError(
                f"`Budget.whole_heads` must be True or False, got {self.whole_heads!r}."
            )

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        values = {name: getattr(self, name) for name in LIMITS}
        return {name: value for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        return " and ".join(
            f"{_shown(name, limit)} {UNITS[name]}" for name, limit in self.limits.items()
        )

    def __repr__(self) -> str:
        changed = [
            f"{one.name}={getattr(self, one.name)!r}"
            for one in fields(self)
            if getattr(self, one.name) != one.default
        ]
        return f"Budget({', '.join(changed)})"


def _shown(name: str, limit: float) -> str:
    """A limit for people: a latency with at least four digits, a number in full."""
    if name != "latency":
        return f"{limit:,}"
    return f"{limit:.4g}" if limit < 1000 else f"{limit:,.0f}"
