"""Groups that the network's code ties to each other, found by trial.

A module may view several tensors with one width, such as the queries and values of its heads, or
compute the width of its heads from that of a stream. Where such a call fails, the groups around it
are tied, and the network is run again. If this does not help, the tie is undone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod

import torch
from torch import Tensor

from drophot.structured.channel_groups import ChannelGroups, Tie
from drophot.structured.dependency_graph import Axis
from drophot.structured.similar_calls import SimilarCalls

Ties = tuple[Tie, ...]


class TieTrials:
    """Ties groups where the network failed, and undoes what did not help.

    Args:
        groups: The channels; their `ties` are updated.
        equal: Whether groups of equal size may lose different numbers of channels, and are tied.
    """

    def __init__(self, groups: ChannelGroups, *, equal: bool) -> None:
        self.groups = groups
        self.equal = equal
        self._tried: set[frozenset[Tie]] = set()
        self._before: tuple[Ties, bool, set[int]] | None = None

    def attempt(
        self, similar: SimilarCalls, training: bool, failures: set[int], removed: Tensor
    ) -> bool:
        """Tie more groups, if there are ties to try.

        Args:
            similar: The recorded calls.
            training: Whether they are those in training mode.
            failures: The numbers of the calls that failed.
            removed: Whether each entry is removed.
        """
        if self._before is not None:
            ties, was_training, before = self._before
            self._before = None
            later = (training, min(failures)) > (was_training, max(before))
            if not (later or failures < before):
                self.groups.ties = ties
        for number in sorted(failures):
            for ties in self._candidates(similar, number, removed):
                if (trial := frozenset(ties)) not in self._tried:
                    self._tried.add(trial)
                    self._before = self.groups.ties, training, failures
                    self.groups.ties += ties
                    return True
        return False

    def _candidates(self, similar: SimilarCalls, number: int, removed: Tensor) -> Iterator[Ties]:
        path = similar.calls[number].path[-1]
        places = [(path, number), *similar.to(path, number)]
        for of_call in (True, False) if self.equal else ():
            ties = [self._equal(similar, *place, of_call) for place in places]
            if self._uneven(ties[0], removed):
                yield tuple(ties)
        sizes = torch.bincount(self.groups.group).tolist()
        for step, whole in dict.fromkeys(self._multiples(similar, path, number, sizes)):
            found = (
                self._whole(self._in_module(similar, place), step, whole, sizes)
                for place, _ in places
            )
            if ties := tuple(tie for tie in found if tie):
                yield ties
            if tie := self._whole(range(len(sizes)), step, whole, sizes):
                yield (tie,)

    def _equal(self, similar: SimilarCalls, path: str, number: int, of_call: bool) -> Tie:
        """Groups in a module that have the size of one in the axes of a call.

        With `of_call`, only those that the module treats as the call does its output.
        """
        call, sizes = similar.calls[number], torch.bincount(self.groups.group).tolist()
        own = {(axis.dim, sizes[group]) for axis, group in self._groups(call.axes)}
        own_sizes, found = {size for _, size in own}, set()
        for other in map(similar.calls.__getitem__, similar.calls_in[path]):
            if not of_call:
                found |= {g for _, g in self._groups(other.axes) if sizes[g] in own_sizes}
            elif other.name == call.name:
                axes = [axis for some in other.output_axes for axis in some]
                found |= {g for axis, g in self._groups(axes) if (axis.dim, sizes[g]) in own}
        return Tie(self._entries(found))

    def _uneven(self, tie: Tie, removed: Tensor) -> bool:
        """Whether tied groups of one size lost different numbers of channels."""
        lost = torch.zeros(len(self.groups.frozen), dtype=torch.bool, device="cpu")
        lost[self.groups.channel[removed]] = True
        sizes = torch.bincount(self.groups.group)
        counts = torch.bincount(self.groups.group[lost], minlength=len(sizes))
        groups = [self.groups.group_of(entry) for entry in tie.heads]
        found = {(int(sizes[group]), int(counts[group])) for group in groups}
        return len(found) > len({size for size, _ in found})

    def _multiples(
        self, similar: SimilarCalls, path: str, number: int, sizes: list[int]
    ) -> Iterator[tuple[int, int]]:
        """Numbers of heads, and sizes of groups that may lose a multiple of it, as a stream."""
        widths = self.groups.widths()
        for n in similar.calls_in[path]:
            call = similar.calls[n]
            for axes, shape in zip(call.output_axes, call.shapes, strict=False):
                for axis in axes if n >= number else ():
                    if not axis.ids.numel():
                        continue
                    channel = self.groups.channel[axis.ids.reshape(-1)[0]]
                    size = sizes[int(self.groups.group[channel])]
                    # A whole head has entries in all later dimensions; pixels and tokens do not.
                    inner = prod(shape[axis.dim + 1 :])
                    if not inner or int(widths[channel]) % inner:
                        continue
                    for start in range(axis.dim, -1, -1):
                        if start < axis.dim and axis.ids.size(start) == 1 < shape[start]:
                            break  # such as the samples of a batch
                        whole = prod(shape[start:])
                        if whole > size > 1 and whole % size == 0 and whole in sizes:
                            yield whole // size, whole

    def _in_module(self, similar: SimilarCalls, path: str) -> set[int]:
        """The groups of all tensors in a module."""
        calls = map(similar.calls.__getitem__, similar.calls_in[path])
        return {group for call in calls for _, group in self._groups(call.axes)}

    def _whole(self, among: Iterable[int], step: int, whole: int, sizes: list[int]) -> Tie | None:
        """Groups of size `whole`, tied to those that are smaller by the factor `step`."""
        heads = [group for group in among if sizes[group] == whole // step]
        wholes = [group for group in among if sizes[group] == whole]
        return Tie(self._entries(heads), self._entries(wholes), step) if heads and wholes else None

    def _groups(self, axes: Iterable[Axis]) -> Iterator[tuple[Axis, int]]:
        """The groups in each axis."""
        for axis in axes:
            for group in self.groups.group[self.groups.channel[axis.ids.reshape(-1)]].unique():
                yield axis, int(group)

    def _entries(self, groups: Iterable[int]) -> tuple[int, ...]:
        """An entry of each group."""
        of_entry = self.groups.group[self.groups.channel]
        entries = torch.arange(len(of_entry), device="cpu")
        first = torch.zeros(int(of_entry.max()) + 1, dtype=torch.int64, device="cpu")
        first.scatter_reduce_(0, of_entry, entries, "amin", include_self=False)
        return tuple(sorted(first[[*groups]].tolist()))
