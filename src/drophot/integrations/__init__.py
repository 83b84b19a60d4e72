"""Trackers in the trainers of other libraries. Each module needs its extra."""

from importlib import import_module as _import_module


def __getattr__(name: str) -> object:
    if name in {"lightning", "transformers"}:
        return _import_module(f"drophot.integrations.{name}")
    raise AttributeError(f"module 'drophot.integrations' has no attribute {name!r}")
