"""Forgetting events: how often each sample was classified correctly and then wrongly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from drophot._core.capturable_hooks import repeatable
from drophot._core.classifier import is_correct
from drophot.tracking import (
    attach,
    deferred_errors,
    fused_update,
    observe,
    packed_history,
    rank_merging,
    score_table,
    validation,
)
from drophot.tracking.batch_matching import Pairing
from drophot.tracking.deferred_errors import NO_TARGET
from drophot.tracking.forgetting_scores import (
    Missing,
    NeverLearned,
    check_never_learned,
    forgetting_scores,
)
from drophot.tracking.record import Rows, record
from drophot.tracking.state import Columns, State, join_histories, to_device
from drophot.tracking.validation import describe

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ForgettingTracker:
    r"""Counts the forgetting events of every training sample.

    A forgetting event: the sample was classified correctly when last presented, and wrongly now,

    .. math:: \mathbb{1}[\arg\max f^{t-1}(x_i) = y_i] \cdot \mathbb{1}[\arg\max f^{t}(x_i) \ne y_i].

    The first presentation of a sample cannot be one. A presentation is one evaluation of one
    sample. The caller decides when samples are presented; two definitions are in use, and they give
    different numbers:

    - *Toneva et al.*: a sample is presented when its training batch is processed, in training mode,
      before the step. Call `update` with the logits that the loop already has, without a pass.
    - *Gupta et al.* ("the state after each epoch"): after every epoch all samples are presented to
      the same weights. Call `observe` after every epoch; it costs one pass in evaluation mode.

    The samples' indices come from :class:`drophot.IndexedDataset`. The state has 12 bytes per
    sample. A pickle or copy of a tracker is independent of it, also in a process that is started
    with one.

    Wrong use is an error. Some errors depend on values: an index out of range, a target that is not
    a class, or a target that differs from the sample's earlier one. On a CPU they are raised at
    once. On a GPU, where reading a value would make the step wait, they are collected on the device
    and raised by `counts`, `learned`, `presentations`, `scores`, `state_dict` and `sync`.

    On a GPU, `update` is one launch of a Triton kernel if torch comes with Triton and the batch has
    at most 4,096 rows, and several operations of torch otherwise.

    References:
        Toneva et al., An Empirical Study of Example Forgetting during Deep Neural Network
        Learning, ICLR 2019, https://arxiv.org/abs/1812.05159. Gupta et al., Drop it Like it's
        Hot: Network Pruning with Data Selection, section 3.2.

    Args:
        num_samples: `N`, the length of the dataset that the indices refer to.
        device: Where the state is kept. `None` means the device of the first batch's logits. With
            another device than that of the logits, every step waits for a copy.

    Raises:
        TypeError: If `num_samples` is not an integer.
        ValueError: If `num_samples` is less than 1.

    Example:
        >>> tracker = ForgettingTracker(num_samples=3)
        >>> index, targets = torch.tensor([2, 0]), torch.tensor([1, 0])
        >>> right = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # predict 1, 0
        >>> tracker.update(index, right, targets)
        >>> tracker.update(index, right.flip(1), targets)  # predict 0, 1
        >>> tracker.counts
        tensor([1, 0, 1])
        >>> tracker.presentations
        tensor([2, 0, 2])
    """

    # None if the state has columns that only plain operations update.
    _layout: fused_update.Layout | None = fused_update.Layout()

    def __init__(self, num_samples: int, *, device: torch.device | str | None = None) -> None:
        self.num_samples = validation.check_size(num_samples)
        self._pairing = Pairing()  # the batches of a watched loader with the logits of a model
        self._state = self._new_state(device)

    @repeatable
    def update(self, index: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Present a batch, and determine from its logits which samples are correct.

        A sample is correct where the largest logit (the first one, if several are equal) is that of
        its target; a row with a NaN is never correct. A sample that occurs twice in a batch is
        presented twice, in that order.

        Args:
            index: The samples' indices in the dataset, integers, shape `(B,)`.
            logits: The model's outputs, shape `(B, C)` with `C` at least 2, any float dtype, with
                or without gradient. Probabilities work as well.
            targets: The true classes, integers from 0 to `C - 1`, shape `(B,)`. Leave samples
                without a class (`ignore_index`, -100) out of all three.

        Raises:
            TypeError: If an argument is not a tensor, has the wrong dtype (integers for `index` and
                `targets`, floats for `logits`), or is distributed over ranks (a DTensor).
            ValueError: If a shape is wrong; on a CPU also if an index is out of range, or a target
                is not a class or differs from the sample's earlier one. Nothing is counted then.
            RuntimeError: If it is called inside a transform of `torch.func`.
        """
        validation.check_batch(index, logits, targets)
        if len(index) == 0:
            return
        with torch.no_grad():
            if not self._present_fused(index, logits, targets):
                self._record_logits(index, logits, to_device(targets, logits.device, torch.int64))

    def update_correct(self, index: Tensor, correct: Tensor) -> None:
        """Present a batch whose correctness the caller has determined, for any other task.

        Without targets, indices that do not follow their samples cannot be detected.

        Args:
            index: The samples' indices in the dataset, integers, shape `(B,)`.
            correct: Whether each sample is correct, bool, shape `(B,)`.

        Raises:
            TypeError: If `index` is not a tensor of integers, or `correct` not a tensor of bools.
            ValueError: If a shape is wrong; on a CPU also if an index is out of range. Nothing is
                counted then.
        """
        if not isinstance(correct, Tensor) or correct.dtype != torch.bool:
            raise TypeError(f"`correct` must be a bool tensor, got {describe(correct)}.")
        if correct.dim() != 1:
            raise ValueError(f"`correct` must have shape (B,), got {tuple(correct.shape)}.")
        validation.check_plain("correct", correct)
        validation.check_vector("index", index, len(correct), "correct")
        if len(index) == 0:
            return
        with torch.no_grad():
            record(self._state, index, correct, None, 0)

    def observe(self, model: nn.Module, loader: Iterable[Any]) -> None:
        """Present every sample of a loader to a model, the definition of Gupta et al.

        This is one pass in evaluation mode, without gradients. Afterwards the modes, the random
        state and the loader's generators are restored, so that training continues bit for bit as it
        would have without the pass. The pass does not use a loader's persistent workers.

        Args:
            model: Called as `model(inputs)`; returns logits `(B, C)`.
            loader: Yields batches `(inputs, targets, index)`, as a DataLoader over an
                :class:`drophot.IndexedDataset` does. Its order does not matter.

        Raises:
            TypeError: If `model` is not a module, `loader` is a dataset, or a batch is not such a
                triple.
            ValueError: If the loader is empty, or as in `update`.
        """
        observe.observe(model, loader, self.update)

    def watch(
        self, loader: Iterable[Any], targets: Callable[[Any], Tensor] | None = None
    ) -> attach.Watched:
        """Wrap a loader for a loop that does not handle indices; used together with `attach`.

        Batches come without their index: `(x, y)`, or a dict without `"index"`. The tracker keeps
        the index and the targets until an attached model computes the logits of the batch.

        Args:
            loader: Yields batches `(inputs, targets, index)` or dicts with the key `"index"`, as a
                DataLoader over an :class:`drophot.IndexedDataset` does.
            targets: Gets the targets `(B,)` from a batch without its index. `None` takes the
                second of a pair, or the only entry of a dict among `targets`, `target`, `labels`
                and `label`.

        Returns:
            An iterable, to be iterated once per epoch. `len`, attributes and errors are those of
            the loader, and an error does not end the epoch. Iterating raises a TypeError if a batch
            has no index or its targets cannot be recognized, and a ValueError if the loader's
            dataset joins several IndexedDatasets. It warns if no batch of a pass was counted.

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
        """Read the logits of a model's forward passes, for the batches of `watch`.

        The first forward in training mode on a batch is its presentation. The forward may take the
        tensors that `watch` handed out, views of them, or their values, moved and cast. Not counted
        are forwards on other data, recomputation in a backward pass, further forwards on the same
        batch, forwards in evaluation mode and those of copies of the model. If the model trains on
        other data while a batch has had no forward, that is an error.

        Args:
            model: The model that the loop calls; compiled, wrapped by DDP or plain.
            logits: Gets the logits `(B, C)` from the model's output. `None` if they are the output.
            changed: Whether the loop changes the values of each batch before its forward
                (normalizes or augments it) and keeps the order of its rows. The batch cannot be
                recognized then, so its forward must be the only one in training mode. A second
                batch or tracker that waits for the model is an error.

        Returns:
            A handle. `handle.remove()` detaches the tracker, and so does leaving
            `with tracker.attach(model):`.

        Raises:
            TypeError: If `model` is not a module; from the model's call if its output is not a
                tensor and `logits` does not say how to get one.
            ValueError: From the model's call, if its output does not have a row for each sample of
                the batch, if its batch cannot be determined (on a GPU or in a compiled model,
                raised when the tracker is next read), and as in `update`.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {describe(model)}.")
        return attach.attach(self, model, logits, changed=changed)

    @property
    def counts(self) -> Tensor:
        """Forgetting events of each sample, int64, shape `(N,)`; 0 if it was never presented."""
        return packed_history.events(self._read()["history"])

    @property
    def learned(self) -> Tensor:
        """Whether each sample was correct at least once, bool, shape `(N,)`."""
        return packed_history.learned(self._read()["history"])

    @property
    def presentations(self) -> Tensor:
        """How often each sample was presented, int64, shape `(N,)`."""
        return packed_history.presentations(self._read()["history"])

    def scores(
        self, never_learned: NeverLearned = "hardest", *, missing: Missing = "raise"
    ) -> Tensor:
        """The forgetting score of each sample; higher is harder. Scores of several runs add up.

        Args:
            never_learned: The score of a sample that was presented but never correct, and so has no
                event. `"hardest"`: its number of presentations (Toneva et al.), and at least 1 more
                than any sample's count. `"zero"`: its count, 0, as if it were the easiest (the
                text of Gupta et al.).
            missing: How to treat samples that were never presented. `"raise"`: raise an error.
                `"nan"`: give them NaN; to select from a part of the data, such as a training split,
                pass `among=train.indices`.

        Returns:
            Scores, shape `(N,)`, on the tracker's device: int64, or float32 if `missing="nan"`.

        Raises:
            ValueError: If an argument is unknown, a sample was never presented, or a batch had
                wrong indices.
        """
        check_never_learned(never_learned)
        history = self._presented(missing)["history"]
        return forgetting_scores(history, never_learned, missing)

    def columns(self) -> dict[str, np.ndarray]:
        """Everything at once, for a table: `pandas.DataFrame(tracker.columns(), index=ids)`.

        Returns:
            NumPy arrays of shape `(N,)`: `index`; `target`, -1 for a sample that was never
            presented with one; `presentations`; `learned`; and `forgetting`, the number of events.

        Raises:
            ValueError: If a batch had wrong indices.
        """
        self._read()
        columns = {
            "index": torch.arange(self.num_samples),
            "target": self._state.targets.clamp(min=NO_TARGET),
            "presentations": self.presentations,
            "learned": self.learned,
            "forgetting": self.counts,
        }
        return {name: column.cpu().numpy().copy() for name, column in columns.items()}

    def to_csv(self, path: Path | str, ids: Iterable[object] | None = None) -> None:
        """Write `columns()` to a CSV file, with a row for each sample in the order of the dataset.

        The file is written atomically. A missing number is `nan`.

        Args:
            path: The file; an existing file is replaced.
            ids: Your own names of the samples, such as file names, in the order of the dataset,
                each different. They become the first column, `id`.

        Raises:
            TypeError: If `ids` is a string or a set.
            ValueError: If `ids` does not have one value for each sample, has a value twice or a
                missing one, or a batch had wrong indices.
            OSError: If the file cannot be written.

        Example:
            >>> from pathlib import Path
            >>> from tempfile import TemporaryDirectory
            >>> tracker = ForgettingTracker(num_samples=2)
            >>> tracker.update_correct(torch.tensor([1]), torch.tensor([True]))
            >>> with TemporaryDirectory() as folder:
            ...     tracker.to_csv(f"{folder}/scores.csv", ids=["cat.png", "dog.png"])
            ...     print(Path(f"{folder}/scores.csv").read_text())
            id,index,target,presentations,learned,forgetting
            cat.png,0,-1,0,False,0
            dog.png,1,-1,1,True,0
            <BLANKLINE>
        """
        score_table.save_csv(Path(path), self.columns(), ids)

    def sync(self, group: ProcessGroup | None = None) -> None:
        """Merge the trackers of all ranks. Call it on every rank, once per epoch.

        Afterwards the tracker of every rank equals that of one process that saw all batches since
        the last `sync`: first those of rank 0, then those of rank 1, and so on. This includes
        the samples that `DistributedSampler` repeats to pad the last batch. In one process this
        does nothing, so that the same script runs with and without torchrun.

        It gathers seven numbers by which the ranks check that they agree, and then the rows of the
        samples presented since the last `sync`, 20 bytes each (44 in a
        :class:`drophot.DynamicsTracker`). After the first `sync` the tracker also keeps the state
        that all ranks started from, 8 bytes per sample (32).

        Args:
            group: The ranks that take part, each with its own batches; `None` means all. If ranks
                share their batches (tensor, context or pipeline parallelism), only one of them
                belongs in a group: `mesh["data"].get_group()`.

        Raises:
            ValueError: On every rank, if any of them received wrong indices, two ranks saw a sample
                with different targets, or their trackers differ in class, size, statistics or the
                state that they loaded. Nothing is merged then. Also if this rank is not in `group`,
                and in one process for wrong indices.
            RuntimeError: If a state was loaded before the process group was initialized.
        """
        self._pairing.process_pending(self)
        rank_merging.sync(self._state, group)

    def reset(self) -> None:
        """Return to the initial state."""
        self._pairing.clear()
        self._state.reset()

    def state_dict(self) -> dict[str, Any]:
        """A copy of the whole state, for `torch.save`.

        Returns:
            Tensors, an integer and optionally strings; `torch.load(weights_only=True)` reads them.

        Raises:
            RuntimeError: If there are several ranks and this one has seen samples since the last
                `sync`, which the other ranks lack.
            ValueError: If a batch had wrong indices.
        """
        self._pairing.process_pending(self)
        self._pairing.check()
        return self._state.dump()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a saved state, on this tracker's device. With several ranks, call it on each.

        Args:
            state_dict: The `state_dict` of a tracker of the same class, size and statistics.

        Raises:
            ValueError: If it has another version, class, size or other statistics, or is not such a
                state. Nothing is changed then.
        """
        self._pairing.process_pending(self)  # a batch that still waits is counted later
        self._state.load(state_dict, type(self).__name__)

    def __getstate__(self) -> dict[str, Any]:
        self._pairing.process_pending(self)
        return self.__dict__.copy()

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            f"Scores must be a vector, got the {type(self).__name__} itself. Pass its `scores()`."
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_samples}, device='{self._state.device}')"

    def _new_state(self, device: torch.device | str | None) -> State:
        return State(self.num_samples, {"history": (torch.int64, ())}, join_histories, device)

    def _read(self) -> Columns:
        """All columns, including the logits that an attached model has given so far."""
        self._pairing.process_pending(self)
        self._pairing.check()
        return self._state.read()

    def _presented(self, missing: Missing) -> Columns:
        """All columns, if every sample was presented or may be missing."""
        columns = self._read()
        validation.check_presented(columns["history"], missing)
        self._pairing.warn()
        return columns

    def _note_unpaired(self, wrong: Tensor) -> None:
        self._state.note(deferred_errors.unpaired(wrong))

    def _memory_of_state(self) -> list[Tensor] | None:
        """What `update` writes to; `None` if it calls scores of the user, in Python."""
        if self._layout is None:
            return None
        return [*self._state.columns.values(), self._state.targets, self._state.fault]

    def _present_fused(self, index: Tensor, logits: Tensor, targets: Tensor) -> bool:
        """Present a batch in one launch on a GPU; False if that is not possible here."""
        layout = self._layout
        return layout is not None and fused_update.present(
            self._state, layout, index, logits, targets
        )

    def _record_logits(self, index: Tensor, logits: Tensor, targets: Tensor) -> Rows:
        correct = is_correct(logits, targets)
        return record(self._state, index, correct, targets, logits.shape[1])
