"""Names of functions, classes and `functools.partial` in messages and tables."""

from __future__ import annotations

from functools import partial

from drophot._core.installed_packages import qualified_name
from drophot._core.signatures import without_partials


def callable_text(thing: object) -> str:
    """The qualified name of a callable with a partial's arguments, without any address.

    Example:
        >>> callable_text(partial(sorted, reverse=True))
        'builtins.sorted(reverse=True)'
    """
    if isinstance(thing, partial):
        arguments = [_shown(argument) for argument in thing.args]
        arguments += [f"{name}={_shown(value)}" for name, value in sorted(thing.keywords.items())]
        return f"{callable_text(thing.func)}({', '.join(arguments)})"
    return qualified_name(thing)


def factory_name(factory: object, made: object) -> str:
    """The name of a model in tables: its factory's, or its class's if the factory has none."""
    name = getattr(without_partials(factory), "__name__", "<lambda>")
    return type(made).__name__ if name == "<lambda>" else name


def _shown(argument: object) -> str:
    text = repr(argument)
    return qualified_name(argument) if callable(argument) or " at 0x" in text else text
