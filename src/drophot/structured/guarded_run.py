"""Checks the arguments of a pruning run, and says whose an error is: the user's or drophot's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from drophot._core.importance import Importance, check_importance
from drophot._core.interruptions import must_propagate
from drophot.prune import prunable_weights
from drophot.prune.adapted_models import (
    check_no_adapters,
    check_not_prepared,
    check_not_quantized,
)
from drophot.structured import reasons
from drophot.structured.importance import squared_magnitude
from drophot.structured.layer_rules import RULES
from drophot.structured.observations import InternalError, UserError
from drophot.structured.operator_call import with_custom_rules
from drophot.structured.pruning_result import Pruned
from drophot.structured.pruning_run import PruningRun, Request
from drophot.structured.rewriter import NondeterministicModel

Rules = Mapping[Any, Callable[..., None]]


def prune(
    caller: str,
    model: nn.Module,
    request: Request,
    example_inputs: Any,
    *,
    skip: Iterable[str] = (),
    importance: Importance | None = None,
    rules: Rules | None = None,
) -> tuple[Pruned, PruningRun]:
    """Prune a network for the public function `caller`; if this fails, it is unchanged."""
    check_importance("importance", importance)
    prunable_weights.check_module("model", model)
    prunable_weights.check_not_program("model", model, inside=True)
    left_out = prunable_weights.left_out(model, skip)
    check_no_adapters(model, left_out)
    weights = prunable_weights.with_channels(model, left_out)
    check_not_prepared(model)
    check_not_quantized(model, left_out)
    prunable_weights.check_finite(weights)
    try:
        run = PruningRun(
            model,
            example_inputs,
            request,
            weights,
            left_out,
            importance or squared_magnitude,
            with_custom_rules(RULES, rules),
        )
        return run.run(), run
    except UserError as found:
        raise found.error from found.error.__cause__
    except NondeterministicModel as found:
        raise ValueError(
            f"`model` must call the same operators each time it is called in evaluation mode, but "
            f"{reasons.operation(found.name)} in {reasons.inside(found.path)} differs from call to "
            f"call. Prune the parts of the model that do not change."
        ) from None
    except (InternalError, *_BUGS) as found:
        error = found.error if isinstance(found, InternalError) else found
        if must_propagate(error) or type(error).__module__.partition(".")[0] not in _KINDS:
            raise error from error.__cause__
        raise RuntimeError(
            f"`{caller}` failed with {type(error).__name__}: {error}. This is a bug in "
            f"drophot, not in your model, which is unchanged; please report it. Passing the names "
            f"of unusual modules as `skip=` may avoid it."
        ) from error


_KINDS = ("builtins", "torch")  # modules of the errors that drophot's own code can raise

# Errors that drophot's own code raises only if it has a bug.
_BUGS = (
    *(AssertionError, AttributeError, LookupError, RuntimeError, ArithmeticError),
    *(StopIteration, NameError, RecursionError, UnboundLocalError),
)
