"""Forgetting events: how often each sample was right and then wrong again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from drophot.tracking import attach, deferred_errors, observe, packed_history, validation
from drophot.tracking.batch_matching import Pairing
from drophot.tracking.state import Columns, State, bring, join_histories
from drophot.tracking.validation import describe

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NeverLearned = Literal["hardest", "zero"]
Missing = Literal["raise", "nan"]


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
    A pickle or copy of a tracker, also one that a started process gets, is a tracker of its own.

    Wrong use is an error. What only the values can tell (an index out of range, a target that is no
    class, or one that differs from the sample's before) is raised at once on a CPU; on a GPU, where
    looking would make the step wait, it is gathered on the device and raised when `counts`,
    `learned`, `presentations`, `scores` or `state_dict` is asked for, and by `sync`.

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
        self.num_samples = validation.size(num_samples)
        self._pairing = Pairing()  # of what a watched loader gave and an attached model gives
        self._follows = device is None
        self._state = self._new_state(device)

    def update(self, index: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Present a batch: judge it by its logits.

        A sample is right where the largest logit (the first one, if several are equal) is its
        target's; a row that holds a NaN is never right. A sample that stands twice in a batch is
        presented twice, in that order.

        Args:
            index: The samples' indices in the dataset, integers, shape `(B,)`.
            logits: The model's outputs, shape `(B, C)` with `C` at least 2, any float dtype, with
                or without gradient. Probabilities do as well.
            targets: The true classes, integers from 0 to `C - 1`, shape `(B,)`. Leave samples
                without a class (`ignore_index`, -100) out of all three.

        Raises:
            TypeError: If an argument is not a tensor, or not of integers (`index`, `targets`) or
                floats (`logits`), or spread over ranks (a DTensor).
            ValueError: If a shape is wrong; on a CPU also if an index is out of range, a target is
                not a class, or not the one that the sample had before. Nothing is counted then.
            RuntimeError: If it is called inside of a transform of `torch.func`.
        """
        validation.batch(index, logits, targets)
        if len(index) == 0:
            return
        with torch.no_grad():
            self._judge(index, logits, bring(targets, logits.device, torch.int64))

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
            raise TypeError(f"`correct` should be a bool tensor. Found {describe(correct)}.")
        if correct.dim() != 1:
            raise ValueError(f"`correct` should have shape (B,). Found {tuple(correct.shape)}.")
        validation.plain("correct", correct)
        validation.vector("index", index, len(correct), "correct")
        if len(index) == 0:
            return
        with torch.no_grad():
            self._record(index, correct, None)

    def observe(self, model: nn.Module, loader: Iterable[Any]) -> None:
        """Present every sample of a loader to a model as it stands: the paper's definition.

        One pass in evaluation mode, without gradients. Afterwards modes, random state and the
        loader's own generators are what they were, so that training goes on bit for bit as it would
        have. A loader with persistent workers is read by other workers.

        Args:
            model: Called as `model(inputs)`, gives logits `(B, C)`.
            loader: Gives batches `(inputs, targets, index)`, as a DataLoader over an
                :class:`drophot.IndexedDataset` does. Its order does not matter.

        Raises:
            TypeError: If `model` is not a module, `loader` a data set, or a batch not such a
                triple.
            ValueError: If the loader gives no batch, or as in `update`.
        """
        observe.observe(model, loader, self.update)

    def watch(
        self, loader: Iterable[Any], targets: Callable[[Any], Tensor] | None = None
    ) -> attach.Watched:
        """The same loader, for a loop that knows nothing of indices; goes with `attach`.

        Batches come without their index: `(x, y)`, or a dict without `"index"`. The tracker keeps
        index and targets until an attached model gives the logits of the batch.

        Args:
            loader: Gives batches `(inputs, targets, index)` or dicts with the key `"index"`, as a
                DataLoader over an :class:`drophot.IndexedDataset` does.
            targets: Gets the targets `(B,)` from a batch without its index. `None` takes the
                second of a pair, or a dict's one entry of `targets`, `target`, `labels`, `label`.

        Returns:
            An iterable, to be iterated once an epoch; `len`, attributes and errors are the
            loader's, and an error does not end the epoch. It raises a TypeError
            where a batch has no index or its targets cannot be recognised, and a ValueError where
            the loader's data set joins several IndexedDatasets. It warns of a pass of which no
            batch was counted, however that ends.

        Example:
            >>> from torch.utils.data import DataLoader
            >>> from drophot import IndexedDataset
            >>> model, data = nn.Linear(2, 3), [(torch.randn(2), i % 3) for i in range(9)]
            >>> tracker = ForgettingTracker(len(data))
            >>> with tracker.attach(model):
            ...     for x, y in tracker.watch(DataLoader(IndexedDataset(data), batch_size=4)):
            ...         loss = nn.functional.cross_entropy(model(x), y)
            >>> tracker.presentations
            tensor([1, 1, 1, 1, 1, 1, 1, 1, 1])
        """
        return attach.Watched(self, loader, targets)

    def attach(
        self,
        model: nn.Module,
        logits: Callable[[Any], Tensor] | None = None,
        *,
        changed: bool = False,
    ) -> RemovableHandle:
        """Read the logits on their way out of a model, for the batches of `watch`.

        The first forward in training mode on a batch is its presentation: on the tensors that
        `watch` handed out, a view of them, or their values, moved and cast as you like. Forwards on
        other data, recomputation in a backward pass, further forwards on the batch, evaluation mode
        and copies of the model are not counted. A batch that is left without a forward of its own
        while the model trains on something else is an error.

        Args:
            model: The model that the loop calls; compiled, wrapped by DDP or plain.
            logits: Gets the logits `(B, C)` from what the model returns. `None` where it returns
                them.
            changed: Whether the loop changes the values of each batch before its forward
                (normalises or augments it), with its rows in the same order. The batch cannot be
                recognised then, so that its forward has to be the only one in training mode, and a
                second batch or tracker that waits on the model is an error.

        Returns:
            A handle: `handle.remove()` ends it, and so does leaving `with tracker.attach(model):`.

        Raises:
            TypeError: If `model` is not a module; from the model's call if its output is not a
                tensor and `logits` does not say how to get one.
            ValueError: From the model's call, if its output has not a row for each sample of the
                batch, if it cannot be told which batch it is of (on a GPU, or in a compiled model,
                where the tracker is read next), and as in `update`.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` should be a torch.nn.Module. Found {describe(model)}.")
        return attach.attach(self, model, logits, changed=changed)

    @property
    def counts(self) -> Tensor:
        """Forgetting events of each sample, int64, shape `(N,)`; 0 if it was never presented."""
        return packed_history.events(self._read()["history"])

    @property
    def learned(self) -> Tensor:
        """Whether each sample was right at least once, bool, shape `(N,)`."""
        return packed_history.learned(self._read()["history"])

    @property
    def presentations(self) -> Tensor:
        """How often each sample was presented, int64, shape `(N,)`."""
        return packed_history.presentations(self._read()["history"])

    def scores(
        self, never_learned: NeverLearned = "hardest", *, missing: Missing = "raise"
    ) -> Tensor:
        """The forgetting score of each sample: higher is harder. Scores of several runs add up.

        Args:
            never_learned: What a sample scores that was presented and never right, and so has no
                event. `"hardest"`: its number of presentations (Toneva et al.) and at least 1 more
                than any sample's count. `"zero"`: its count, 0, as if it were the easiest (the
                paper's text).
            missing: What happens if a sample was never presented. `"raise"`: an error. `"nan"`: it
                scores NaN; for a part of the data, such as a training split, select with
                `among=train.indices`.

        Returns:
            Scores, shape `(N,)`, on the tracker's device: int64, or float32 if `missing="nan"`.

        Raises:
            ValueError: If a word is none of those, a sample was never presented, or an index wrong.
        """
        if never_learned not in ("hardest", "zero"):
            raise ValueError(
                f'`never_learned` should be "hardest" or "zero". Found {never_learned!r}.'
            )
        history = self._presented(missing)["history"]
        scores, presented = packed_history.events(history), packed_history.presentations(history)
        if never_learned == "hardest":
            above = torch.maximum(presented, scores.max() + 1)
            scores = torch.where(packed_history.learned(history), scores, above)
        if missing == "raise":
            return scores
        return scores.float().masked_fill_(presented == 0, torch.nan)

    def sync(self, group: ProcessGroup | None = None) -> None:
        """Merge what the ranks have seen; called on each of them, once an epoch.

        Afterwards the tracker of every rank is equal to that of one process that saw everything
        since the last `sync`: the batches of rank 0, then those of rank 1, and so on. That is the
        order in which `DistributedSampler` repeats samples to pad the last batch. In one process
        this does nothing, so that the same script runs with and without torchrun.

        It takes one gather of the rows of samples that were presented since the last `sync`, 20
        bytes each (44 in a :class:`drophot.DynamicsTracker`), after one of six numbers by which
        the ranks agree. From then on the tracker also keeps what all of them started from, 8 bytes
        a sample (32).

        Args:
            group: The ranks that take part, each with batches of its own; `None` means all. Of
                ranks that share their batches (tensor, context or pipeline parallel) one takes part
                in a group: `mesh["data"].get_group()`.

        Raises:
            ValueError: On every rank, if any of them was given wrong indices, if two saw a sample
                with different targets, or if their trackers differ in kind, size or what they
                loaded. Nothing is merged then.
                Also if this rank is not in `group`, and in one process for wrong indices.
            RuntimeError: If a state was loaded before the process group was set up.
        """
        self._pairing.settle(self)
        self._state.sync(group)

    def reset(self) -> None:
        """Forget everything, as if newly made."""
        self._pairing.give_up()
        self._state.reset()

    def state_dict(self) -> dict[str, Any]:
        """The whole state as a copy: tensors and an integer, for `torch.save`.

        Returns:
            What `load_state_dict` takes; `torch.load(weights_only=True)` reads it.

        Raises:
            RuntimeError: If there are several ranks and this one has seen samples since the last
                `sync`: a checkpoint would lack what the others have seen.
            ValueError: If a batch came with wrong indices.
        """
        self._pairing.settle(self)
        self._pairing.check()
        return self._state.dump()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state, on this tracker's device; with several ranks, on each of them.

        Args:
            state_dict: What `state_dict` gave for the same number of samples.

        Raises:
            ValueError: If it is of another version, kind or size, or no such state. Nothing is
                changed then.
        """
        self._pairing.settle(self)  # a batch that waits still will be counted
        self._state.load(state_dict, type(self).__name__)

    def __getstate__(self) -> dict[str, Any]:
        self._pairing.settle(self)
        return self.__dict__.copy()

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            f"A vector of scores should be given. Found the {type(self).__name__} itself; give its "
            f"`scores()`."
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_samples}, device='{self._state.device}')"

    def _new_state(self, device: torch.device | str | None) -> State:
        return State(self.num_samples, {"history": (torch.int64, ())}, join_histories, device)

    def _read(self) -> Columns:
        """All columns, with what an attached model has given so far."""
        self._pairing.settle(self)
        self._pairing.check()
        return self._state.read()

    def _presented(self, missing: Missing) -> Columns:
        """All columns, if every sample was presented or need not have been."""
        columns = self._read()
        validation.presented(columns["history"], missing)
        self._pairing.warn()
        return columns

    def _doubt(self, wrong: Tensor) -> None:
        self._state.note(deferred_errors.unpaired(wrong))

    def _judge(self, index: Tensor, logits: Tensor, targets: Tensor) -> _Rows:
        top = logits.max(dim=1)
        correct = (top.indices == targets) & (top.values > -torch.inf)  # nor is NaN
        return self._record(index, correct, targets, logits.shape[1])

    def _record(
        self, index: Tensor, correct: Tensor, targets: Tensor | None, num_classes: int = 0
    ) -> _Rows:
        state = self._state
        if self._follows and state.device != correct.device:
            state.move(correct.device)
        self._follows = False
        device = state.device
        correct = bring(correct, device)
        index = bring(index, device, torch.int64)

        place = index.clamp(0, self.num_samples - 1)
        if targets is None:
            state.expect(index, (place, index), classes=None)
        else:
            classes = bring(targets, device)
            targets = classes.to(torch.int32)
            seen = state.targets.index_select(0, place)
            known = torch.where(seen < 0, targets, seen)
            nearest = classes.clamp(0, num_classes - 1)
            state.expect(index, (place, index), (known, targets), classes=(nearest, classes))
            state.targets.index_copy_(0, place, known)

        place, order = place.sort(stable=True)
        again = place[1:] == place[:-1]
        if state.looks and not again.any():
            again = None  # the usual batch, with less to do
        correct = correct.index_select(0, order)
        packed_history.present(state.columns["history"], place, correct, again, state.steps)
        return _Rows(place, order, again)


class _Rows(NamedTuple):
    """Where a batch went: the samples, ascending, and each one's row in the batch.

    `again` says of all but the first whether it is the same sample as the one before, if any is.
    """

    place: Tensor
    order: Tensor
    again: Tensor | None
