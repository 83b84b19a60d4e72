"""The hooks in which a run can differ from the paper's text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from drophot._core.signatures import signature_error
from drophot.coreset.selectors import Evidence, Selector, check_evidence
from drophot.pipeline import modes
from drophot.settings.declarations import Settings
from drophot.settings.names import Named, name_of


class SampleCounter(Protocol):
    """Counts the events of every sample in step 1, in place of a tracker."""

    scores: Tensor
    """Shape `(N,)`; higher is harder."""

    def observe(self, model: nn.Module, batches: Iterable[Any]) -> None:
        """Called after each epoch with all samples, batch by batch, in a fixed order."""
        ...


class SelectionHook(Protocol):
    """Selects samples by their scores, in place of `drophot.select`."""

    def __call__(self, scores: Tensor, ratio: float, mode: Literal["high", "low"]) -> Tensor: ...


_HOOK_ARGUMENTS: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("counter", (1, 0), "two arguments, the number of samples and the seed"),
    ("select", (None, 0.5, "high"), "three arguments, the scores, the ratio and the mode"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProtocol:
    """The hooks in which a run can differ from the paper's text, for `DropHot(protocol=...)`.

    A hook that is left at its default follows the text.

    Args:
        name: How records, files and tables call the protocol: letters, digits, ".", "_" and "-".
        counter: Called as `counter(num_samples, seed)` when step 1 starts. It returns an object
            that counts the events of every sample: `observe(model, batches)` is called after each
            epoch with all samples in a fixed order, and `scores` holds the counts `(N,)` in the
            end. No tracker follows the training then, so that only forgetting scores exist.
        select: Called as `select(scores, ratio, mode)` in step 2, where `mode` is `"high"` or
            `"low"`. It returns the positions of the kept samples `(K,)`.
        holds_masks: Whether removed weights stay zero in step 5.
        baseline_in_eval_mode: Whether trainings on the full training set (step 1, and step 3 if
            everything is kept) run in evaluation mode.

    Raises:
        TypeError: If a hook is not callable or cannot take its arguments, or one of the last two
            is not a bool.

    Example:
        >>> RunProtocol(name="regrown", holds_masks=False).select is None
        True
    """

    name: str
    counter: Callable[[int, int], SampleCounter] | None = None
    select: SelectionHook | None = None
    holds_masks: bool = True
    baseline_in_eval_mode: bool = False

    def __post_init__(self) -> None:
        for name in ("counter", "select"):
            hook = getattr(self, name)
            if hook is not None and not callable(hook):
                raise TypeError(f"`{name}` must be callable or None, got {hook!r}.")
        for name, arguments, words in _HOOK_ARGUMENTS:
            hook = getattr(self, name)
            if hook is not None and (wrong := signature_error(hook, *arguments)):
                raise TypeError(f"`{name}` must take {words}, got {wrong}.")
        for name in ("holds_masks", "baseline_in_eval_mode"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False, got {value!r}.")

    def selector(self, mode: str | Named) -> Selector | None:
        """What selects in place of a mode, if the protocol does.

        Args:
            mode: The mode of the run.

        Returns:
            The selector; `None` for the mode's own.
        """
        name = name_of(mode)
        if self.select is not None and (name == "high" or name == "low"):
            return _HookSelector(self.name, self.select, name)
        return None


@dataclass(frozen=True, slots=True)
class _HookSelector:
    """Selects by the hook of a protocol."""

    name: str
    hook: SelectionHook
    end: Literal["high", "low"]

    needs = ("scores",)

    def select(self, ratio: float, evidence: Evidence, seed: int) -> Tensor:
        check_evidence(self, evidence)
        assert evidence.scores is not None
        return self.hook(evidence.scores, ratio, self.end)


def check_protocol(protocol: RunProtocol, settings: Settings) -> None:
    """Check that the settings can be combined with the hooks of their protocol."""
    given = f"protocol={name_of(settings.protocol)!r}"
    mode, scope = name_of(settings.mode), settings.scope
    scheduled = settings.schedule != "one-shot"
    statistic = modes.statistic_of(settings.mode)
    needs: Collection[str] = getattr(settings.mode, "needs", ())
    for wrong, other, why in (
        (
            protocol.select is not None and mode not in ("high", "low", "random"),
            f"mode={mode!r}",
            'it has its own rule for "high" and "low". Use mode="high", "low" or "random".',
        ),
        (
            protocol.counter is not None
            and (statistic not in (None, "forgetting") or "confidence" in needs),
            f"mode={mode!r}",
            "it counts events and has no other score. Use a mode that selects by forgetting.",
        ),
        (
            protocol.counter is not None and settings.forgetting != "paper",
            f"forgetting={settings.forgetting!r}",
            "it counts events in its own way. Remove `forgetting`.",
        ),
        (
            settings.protocol == "released" and scope != "layer",
            f"scope={scope!r}",
            "the released code prunes layer by layer. Remove `scope`.",
        ),
        (
            not protocol.holds_masks and scheduled,
            f"schedule={settings.schedule!r}",
            "it holds no masks. Remove `schedule`.",
        ),
        (
            not protocol.holds_masks and bool(settings.structured),
            f"structured={settings.structured!r}",
            "it holds no masks. Remove `structured`.",
        ),
    ):
        if wrong:
            raise ValueError(f"`{given}` cannot be combined with `{other}`: {why}")
