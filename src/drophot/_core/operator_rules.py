"""The keys of a user's rules for operators: operators, or their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

Operator = OpOverload | OpOverloadPacket


def operator_of(key: object) -> Operator:
    """The operator that a key of `rules` stands for.

    Raises:
        TypeError: If the key is not an operator.
        ValueError: If it is a name that no registered operator has.
    """
    operator = getattr(key, "_opoverload", key)  # of a `torch.library.custom_op`
    if isinstance(operator, OpOverload | OpOverloadPacket):
        return operator
    if not isinstance(key, str):
        raise TypeError(
            f"`rules` must map operators to functions, got the key {key!r}. Pass the result of "
            f"`torch.library.custom_op`, `torch.ops.<namespace>.<name>`, or a name such as "
            f"'namespace::name'."
        )
    namespace, _, rest = key.partition("::")
    name, _, overload = rest.partition(".")
    try:
        packet = getattr(getattr(torch.ops, namespace), name)
        return getattr(packet, overload) if overload else packet
    except (AttributeError, RuntimeError):
        raise ValueError(
            f"`rules` must map operators to functions, got the name {key!r}, which no operator "
            f"has. Write it as 'namespace::name', and import the module that registers it."
        ) from None


def check_rule(operator: Operator, rule: object) -> None:
    if isinstance(rule, type) or not callable(rule):
        raise TypeError(
            f"`rules` must map operators to functions, got {rule!r} for {operator}. Pass a "
            f"function `rule(call, *args, **kwargs)`."
        )


def rules_by_name(name: str, value: Any) -> dict[str, Callable[..., None]] | None:
    """The check of the setting `rules`: rules by the names of operators, which can be pickled."""
    if not value and (value is None or isinstance(value, Mapping)):
        return None
    if not isinstance(value, Mapping):
        raise TypeError(
            f"`{name}` must map operators to functions, got {value!r:.80}. Pass a dictionary."
        )
    named = dict[str, Callable[..., None]]()
    for key, rule in value.items():
        operator = operator_of(key)
        check_rule(operator, rule)
        named[_name(operator)] = rule
    return dict(sorted(named.items()))


def _name(operator: Operator) -> str:
    if isinstance(operator, OpOverload):
        return f"{operator.overloadpacket._qualified_op_name}.{operator._overloadname}"
    return operator._qualified_op_name
