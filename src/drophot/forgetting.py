"""Forgetting events: how often each sample was right and then wrong again."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from drophot._untouched import untouched

# One sample's history is one int64, so that a batch costs one gather and one addition:
# presentations (20 bits), presentations that were right (21), events (21), right last time (1).
# Events and rights never exceed presentations; presentations that outgrow their field turn the
# sign bit on, which every read checks.
_EVENT, _RIGHT, _PRESENTED = 1 << 1, 1 << 22, 1 << 43
_FIELD = (1 << 21) - 1
_NO_FAULT = torch.iinfo(torch.int64).max


class ForgettingTracker:
    r"""Counts the forgetting events of every training sample.

    A forgetting event: the sample was classified right when last presented, and wrong now,

    .. math:: \mathbb{1}[\arg\max f^{t-1}(x_i) = y_i] \cdot \mathbb{1}[\arg\max f^{t}(x_i) \ne y_i].

    The first presentation of a sample cannot be one. What counts as a presentation is the
    caller's choice, and the two in use give different numbers:

    - *Toneva's*: a sample is judged when its training batch passes, in training mode, before the
      step. Call `update` with the logits that the loop already has; it costs no pass.
    - *The paper's* ("the state after each epoch"): after every epoch all samples are judged by
      the same weights. Call `observe` there; it costs one pass in evaluation mode.

    The samples' indices come from :class:`drophot.IndexedDataset`. The state is 12 bytes a sample.

    Wrong use is an error. What only the values can tell (an index out of range, or a sample whose
    target differs from the one seen before) is raised at once on a CPU; on a GPU, where looking
    would make the step wait, it is gathered on the device and raised when `counts`, `learned`,
    `presentations`, `scores` or `state_dict` is asked for.

    References:
        Toneva et al., An Empirical Study of Example Forgetting during Deep Neural Network
        Learning, ICLR 2019, https://arxiv.org/abs/1812.05159. Gupta et al., Drop it Like it's
        Hot: Network Pruning with Data Selection, section 3.2.

    Args:
        num_samples: `N`, the length of the dataset whose indices will come.
        device: Where the state lives. `None` means where the first batch's logits are. A device
            other than the logits' makes every step wait for a copy.

    Raises:
        TypeError: If `num_samples` is not an integer.
        ValueError: If `num_samples` is less than 1.

    Example:
        >>> tracker = ForgettingTracker(num_samples=3)
        >>> index, targets = torch.tensor([2, 0]), torch.tensor([1, 0])
        >>> right = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # logits that say 1, 0
        >>> tracker.update(index, right, targets)
        >>> tracker.update(index, right.flip(1), targets)  # logits that say 0, 1
        >>> tracker.counts
        tensor([1, 0, 1])
        >>> tracker.presentations
        tensor([2, 0, 2])
    """

    def __init__(self, num_samples: int, *, device: torch.device | str | None = None) -> None:
        self.num_samples = operator.index(num_samples)
        if self.num_samples < 1:
            raise ValueError(
                f"`num_samples` should be at least 1. Found {num_samples}; give the length of "
                f"the dataset."
            )
        self._follows = device is None
        self._history = torch.zeros(self.num_samples, dtype=torch.int64, device=device)
        self._targets = torch.full((self.num_samples,), -1, dtype=torch.int32, device=device)
        self._fault = torch.tensor(_NO_FAULT, device=device)
        self._steps = _steps(self._history.device)

    def update(self, index: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Present a batch: judge it by its logits.

        A sample is right where the largest logit (the first one, if several are equal) is its
        target's; a row that holds a NaN is never right. A sample that stands twice in a batch is
        presented twice, in that order.

        Args:
            index: The samples' indices in the dataset, integers, shape `(B,)`.
            logits: The model's outputs, shape `(B, C)` with `C` at least 2, any float dtype, with
                or without gradient. Probabilities do as well.
            targets: The true classes, integers, shape `(B,)`.

        Raises:
            TypeError: If an argument is not a tensor, or not of integers (`index`, `targets`) or
                floats (`logits`).
            ValueError: If a shape is wrong; on a CPU also if an index is out of range or a
                sample's target is not the one it had before. Nothing is counted then.
        """
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise TypeError(f"`logits` should be a float tensor. Found {_kind(logits)}.")
        if logits.dim() != 2 or logits.shape[1] < 2:
            raise ValueError(
                f"`logits` should have shape (B, C) with C at least 2. Found "
                f"{tuple(logits.shape)}; for any other kind of output judge it yourself and call "
                f"`update_correct`."
            )
        _check_vector("index", index, len(logits), "logits")
        _check_vector("targets", targets, len(logits), "logits")
        with torch.no_grad():
            top = logits.max(dim=1)
            targets = targets.to(logits.device, non_blocking=True)
            correct = (top.indices == targets) & (top.values == top.values)  # NaN is not NaN
            self._record(index, correct, targets)

    def update_correct(self, index: Tensor, correct: Tensor) -> None:
        """Present a batch that the caller has judged: multi-label, sequences, anything.

        Targets are not seen here, so that indices that do not follow their samples go unnoticed.

        Args:
            index: The samples' indices in the dataset, integers, shape `(B,)`.
            correct: Whether each sample is right, bool, shape `(B,)`.

        Raises:
            TypeError: If an argument is not a tensor, `index` not of integers or `correct` not
                of bools.
            ValueError: If a shape is wrong; on a CPU also if an index is out of range. Nothing is
                counted then.
        """
        if not isinstance(correct, Tensor) or correct.dtype != torch.bool:
            raise TypeError(f"`correct` should be a bool tensor. Found {_kind(correct)}.")
        if correct.dim() != 1:
            raise ValueError(f"`correct` should have shape (B,). Found {tuple(correct.shape)}.")
        _check_vector("index", index, len(correct), "correct")
        with torch.no_grad():
            self._record(index, correct, None)

    def observe(self, model: nn.Module, loader: Iterable[Any]) -> None:
        """Present every sample of a loader to a model as it stands: the paper's definition.

        One pass in evaluation mode, without gradients. Afterwards each submodule is in the mode
        it was in and torch's random state is what it was, so that training goes on bit for bit
        as it would have.

        Args:
            model: Called as `model(inputs)`, gives logits `(B, C)`.
            loader: Gives batches `(inputs, targets, index)`, as a DataLoader over an
                :class:`drophot.IndexedDataset` does. Its order does not matter.

        Raises:
            TypeError: If a batch is not such a triple.
            ValueError: If the loader gives no batch, or as in `update`.
        """
        batch = None
        with untouched(model) as device:
            for batch in loader:
                if not isinstance(batch, tuple | list) or len(batch) != 3:
                    raise TypeError(
                        f"`loader` should give batches (inputs, targets, index). Found "
                        f"{_kind(batch)}; wrap the dataset in IndexedDataset, or call `update` "
                        f"with the logits of your own evaluation pass."
                    )
                inputs, targets, index = batch
                self.update(index, model(inputs.to(device)), targets)
        if batch is None:
            raise ValueError("`loader` should give at least one batch. Found none.")

    @property
    def counts(self) -> Tensor:
        """Forgetting events of each sample, int64, shape `(N,)`."""
        self._check_faults()
        return (self._history >> 1) & _FIELD

    @property
    def learned(self) -> Tensor:
        """Whether each sample was right at least once, bool, shape `(N,)`."""
        self._check_faults()
        return (self._history >> 22) & _FIELD > 0

    @property
    def presentations(self) -> Tensor:
        """How often each sample was presented, int64, shape `(N,)`."""
        self._check_faults()
        return self._history >> 43

    def scores(self, never_learned: Literal["hardest", "zero"] = "hardest") -> Tensor:
        """The forgetting score of each sample: higher is harder.

        Scores of several runs add up. A sample that was never presented scores 0: see
        `presentations` where that can happen.

        Args:
            never_learned: What a sample scores that was never right and so has no event.
                `"hardest"`: its number of presentations, above every count (Toneva et al.).
                `"zero"`: its count, 0, as if it were the easiest (the paper's text).

        Returns:
            Scores, int64, shape `(N,)`, on the tracker's device.

        Raises:
            ValueError: If `never_learned` is neither, or a batch came with wrong indices.
        """
        if never_learned not in ("hardest", "zero"):
            raise ValueError(
                f'`never_learned` should be "hardest" or "zero". Found {never_learned!r}.'
            )
        if never_learned == "zero":
            return self.counts
        return torch.where(self.learned, self.counts, self.presentations)

    def reset(self) -> None:
        """Forget everything, as if newly made."""
        self._history.zero_()
        self._targets.fill_(-1)
        self._fault.fill_(_NO_FAULT)

    def state_dict(self) -> dict[str, Any]:
        """The whole state as a copy: tensors and an integer, for `torch.save`.

        Returns:
            What `load_state_dict` takes; `torch.load(weights_only=True)` reads it.
        """
        self._check_faults()
        return {"version": 1, "history": self._history.clone(), "targets": self._targets.clone()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state, on this tracker's device.

        Args:
            state_dict: What `state_dict` gave for the same number of samples.

        Raises:
            ValueError: If it is of another version, another size, or no such state.
        """
        version = state_dict.get("version")
        if version != 1:
            raise ValueError(
                f"`state_dict` should be of version 1. Found version {version!r}; it was not "
                f"written by this version of ForgettingTracker."
            )
        for name, mine in (("history", self._history), ("targets", self._targets)):
            found = state_dict.get(name)
            if not isinstance(found, Tensor) or found.dtype != mine.dtype:
                raise ValueError(
                    f'`state_dict["{name}"]` should be a tensor of {mine.dtype}. Found '
                    f"{_kind(found)}."
                )
            if found.shape != mine.shape:
                raise ValueError(
                    f"`state_dict` should hold {self.num_samples} samples. Found "
                    f"{tuple(found.shape)}; make the tracker with the number of samples that it "
                    f"had when saved."
                )
        self._history.copy_(state_dict["history"])
        self._targets.copy_(state_dict["targets"])
        self._fault.fill_(_NO_FAULT)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_samples}, device='{self._history.device}')"

    def _record(self, index: Tensor, correct: Tensor, targets: Tensor | None) -> None:
        if len(index) == 0:
            return
        if self._follows and self._history.device != correct.device:
            self._move(correct.device)
        self._follows = False
        device = self._history.device
        correct = correct.to(device, non_blocking=True)
        index = index.to(device, torch.int64, non_blocking=True)

        place = index.clamp(0, self.num_samples - 1)
        wrong = place != index
        known = None
        if targets is not None:
            targets = targets.to(device, torch.int32, non_blocking=True)
            seen = self._targets.index_select(0, place)
            known = torch.where(seen < 0, targets, seen)
            wrong = wrong | (known != targets)
        fault = torch.where(wrong, index, _NO_FAULT).amin()
        if device.type == "cpu" and not torch.compiler.is_compiling():
            self._check(int(fault))
        else:
            self._fault.copy_(torch.minimum(self._fault, fault))
        if known is not None:
            self._targets.index_copy_(0, place, known)

        # Sorted, a sample's repeats in the batch stand side by side, and the one before tells
        # whether it was right last time. Each adds its step to the history; the steps of repeats
        # add up to the same as one after the other.
        place, order = place.sort(stable=True)
        correct = correct.index_select(0, order).long()
        before = self._history.index_select(0, place) & 1
        before[1:] = torch.where(place[1:] == place[:-1], correct[:-1], before[1:])
        self._history.index_add_(0, place, self._steps.index_select(0, 2 * before + correct))

    def _move(self, device: torch.device) -> None:
        # Not as tensors of inference mode, which no later training step could update.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            self._history = self._history.to(device)
            self._targets = self._targets.to(device)
            self._fault = self._fault.to(device)
            self._steps = self._steps.to(device)

    def _check_faults(self) -> None:
        self._check(int(self._fault))
        if bool((self._history < 0).any()):
            raise ValueError(
                f"A sample should be presented at most {(1 << 20) - 1} times. Found more; call "
                f"`reset` before that and add the scores up."
            )

    def _check(self, fault: int) -> None:
        if fault == _NO_FAULT:
            return
        if not 0 <= fault < self.num_samples:
            raise ValueError(
                f"`index` should be in [0, {self.num_samples}). Found {fault}; indices come from "
                f"IndexedDataset, and `num_samples` is the length of that dataset."
            )
        raise ValueError(
            f"`targets` should be the same for a sample each time. Found sample {fault} with "
            f"target {int(self._targets[fault])} at first and another one later: indices do not "
            f"follow their samples; take them from IndexedDataset, not from the position in a "
            f"shuffled loader."
        )


def _steps(device: torch.device) -> Tensor:
    """What a presentation adds to a history, by `2 * right_before + right_now`."""
    return torch.tensor(
        [_PRESENTED, _PRESENTED + _RIGHT + 1, _PRESENTED + _EVENT - 1, _PRESENTED + _RIGHT],
        device=device,
    )


def _check_vector(name: str, value: Any, length: int, other: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` should be a tensor of integers. Found {_kind(value)}.")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"`{name}` should be a tensor of integers. Found {value.dtype}.")
    if value.dim() != 1:
        raise ValueError(f"`{name}` should have shape (B,). Found {tuple(value.shape)}.")
    if len(value) != length:
        raise ValueError(
            f"`{name}` should have one entry for each row of `{other}`, {length}. Found "
            f"{len(value)}."
        )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__
