"""Removes channels from a network, checks the result and keeps channels until all checks pass.

The loop is in `Rewriter.run`: select the least important channels, write the smaller tensors into
the network, adjust the width attributes that its code reads, run it and compare it call by call
with the recorded pass, and then by value with the network in which the channels are zero. Each
failure freezes the channels of the call that failed, and the loop starts again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from drophot._core.importance import Importance
from drophot.structured import attention_heads
from drophot.structured.attention_heads import VIEWS, WholeHeads
from drophot.structured.channel_groups import ChannelGroups
from drophot.structured.dependency_graph import Axis, DependencyGraph
from drophot.structured.explanation import explain
from drophot.structured.layer_widths import producing_weights
from drophot.structured.network_writer import NetworkWriter
from drophot.structured.observations import PassResult, UserError, differs, first_difference
from drophot.structured.passes import run_pass
from drophot.structured.reasons import VALUES, why_kept
from drophot.structured.recorded_call import SIZED, RecordedCall
from drophot.structured.similar_calls import SimilarCalls
from drophot.structured.substitution import Attribute
from drophot.structured.tie_trials import TieTrials
from drophot.structured.verification import kept_shapes
from drophot.structured.width_search import NEXT, WidthSearch

# Operators that raise an error before they are called if sizes do not match.
CHECKS_SIZES = SIZED | {"clone", "unfold", "cat", "add", "mul"}


_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

# Which entries are removed, given the channels and the score of each.
Select = Callable[[ChannelGroups, Tensor], Tensor]

# The recorded calls, whether they are those in training mode, and why which of them failed.
Failed = tuple[list[RecordedCall], bool, Mapping[int, str]]


class Rewriter:
    """Removes channels of a network.

    Args:
        model: The network.
        graph: The entries of its tensors, and how they are coupled.
        calls: The recorded calls in evaluation mode.
        weights: The weights of Conv and Linear layers, by name.
        ratio: The share that was requested, if one was, for the explanations.
        importance: The importance of weights or of output channels.
        training: The recorded calls in training mode, if they include other operators.
        tried_heads: Heads that have already been tried as a whole.
        left_out: The parameters that keep their shape, which have no importance.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: DependencyGraph,
        calls: list[RecordedCall],
        weights: Mapping[str, nn.Parameter],
        ratio: float | None,
        importance: Importance,
        training: Sequence[RecordedCall] = (),
        tried_heads: Collection[tuple[str, int]] = (),
        left_out: Collection[int | str] = (),
    ) -> None:
        self.model = model
        self.graph = graph
        self.calls = calls
        self.training = list(training)
        self.ratio = ratio
        self.importance = importance
        self.tried_heads = set(tried_heads)
        self.left_out = left_out
        self.weights, self._output_dims = producing_weights(model, graph, weights)
        produced = [
            (self.output_dim(name), graph.axes_of(weight)) for name, weight in self.weights.items()
        ]
        outputs = [
            axis.ids.reshape(-1) for dim, axes in produced for axis in axes if axis.dim == dim
        ]
        self.groups = ChannelGroups(graph, outputs)
        self.removed = torch.zeros(graph.num_entries, dtype=torch.bool, device="cpu")
        self.writer = NetworkWriter(model, graph, calls)
        self._width_search = WidthSearch(model)
        self._ties = TieTrials(self.groups, equal=ratio is None)
        self._similar: dict[bool, SimilarCalls] = {}  # of the calls in training mode or evaluation
        self._num_failed: Counter[tuple[Any, ...]] = Counter()  # of similar calls
        self._failed: dict[bytes, Failed] = {}  # by what was removed
        self._runs_dense: set[bool] = set()  # modes in which the dense network raises no error
        self._evaluation = PassResult()

    def run(self, example_inputs: Any, select: Select) -> None:
        """Remove the channels; if this fails, the network is unchanged.

        Args:
            example_inputs: The inputs to call the network with.
            select: Which entries are removed, given the channels and their scores.
        """
        try:
            while True:
                if failed := self._remove(select):
                    self._keep_more(*failed)
                elif (
                    not self._fails(example_inputs, self.calls, False)
                    and not (self.training and self._fails(example_inputs, self.training, True))
                    and not self._values_differ(example_inputs)
                ):
                    return
        except BaseException:
            self.writer.restore()
            raise

    def reasons(self) -> tuple[dict[str, str], dict[str, str]]:
        """Why layers kept all of their channels, and why others kept some, by the weight's name."""
        found = {}
        for name, weight in self.weights.items():
            own = [axis for axis in self.graph.axes_of(weight) if axis.dim == self.output_dim(name)]
            if own or weight.shape[self.output_dim(name)] > 1:
                found[name] = own
        return explain(self.graph, self.groups, self.removed, found, self.ratio)

    def kept_channels(self) -> dict[str, Tensor]:
        """The outputs that each layer keeps, by the weight's name."""
        found, entries = {}, self.output_entries()
        for name, weight in self.weights.items():
            keep_mask = torch.ones(
                weight.shape[self.output_dim(name)], dtype=torch.bool, device="cpu"
            )
            if name in entries:
                keep_mask = ~self.removed[entries[name]]
            found[name] = keep_mask.nonzero()[:, 0]
        return found

    def kept_norm_channels(self) -> dict[str, Tensor]:
        """The channels that each norm with a weight keeps, by the weight's name."""
        found = {}
        for tensor, name in self.graph.names.items():
            path, _, attribute = name.rpartition(".")
            is_norm = isinstance(self.model.get_submodule(path), _NORMS)
            if is_norm and attribute == "weight" and tensor.dim() == 1:
                keep_mask = torch.ones(len(tensor), dtype=torch.bool, device="cpu")
                for axis in self.graph.axes.get(tensor) or ():
                    keep_mask = ~self.removed[axis.ids]
                found[name] = keep_mask.nonzero()[:, 0]
        return found

    def output_entries(self) -> dict[str, Tensor]:
        """The entries of the outputs of each layer, by the weight's name, `(C_out,)`."""
        return {
            name: axis.row()
            for name, weight in self.weights.items()
            for axis in self.graph.axes_of(weight)
            if axis.dim == self.output_dim(name)
        }

    def channel_numbers(self) -> dict[str, list[int]]:
        """A number for each output of each layer; outputs that are removed together have one."""
        entries, number = self.output_entries(), len(self.groups.frozen)
        found = {}
        for name, weight in self.weights.items():
            size = weight.shape[self.output_dim(name)]
            if name in entries:
                found[name] = self.groups.channel[entries[name]].tolist()
            else:  # of a single output, or not used
                found[name] = list(range(number, number + size))
                number += size
        return found

    def output_dim(self, name: str) -> int:
        """The dimension of a weight that has its output channels."""
        return self._output_dims[name]

    def _remove(self, select: Select) -> Failed | None:
        """Select channels and write the smaller tensors into the network.

        If the network already failed without these channels, it is not run again, and the result
        says how it failed.
        """
        weights = {
            name: (weight, self.output_dim(name), self.graph.axes_of(weight))
            for name, weight in self.weights.items()
            # If it is left out, its inputs and outputs are frozen, so it needs no scores.
            if id(weight) not in self.left_out
        }
        scores = self.groups.scores(weights, self.importance)
        self.removed = select(self.groups, scores)
        if failed := self._failed.get(self.removed.numpy().tobytes()):
            return failed
        self.writer.remove(self.removed)
        return None

    def _fails(self, example_inputs: Any, calls: list[RecordedCall], training: bool) -> bool:
        """Whether calls fail; if so, the channels that they need are kept from now on."""

        def attempt(own: Mapping[Attribute, Any]) -> PassResult:
            self.writer.write(own)
            result = run_pass(
                self.model, example_inputs, calls, self.removed, training=training, shapes=shapes
            )
            if result.error is not None:
                self._raise_error_of_model(result, example_inputs, calls, training)
            return result

        shapes = kept_shapes(calls, self.removed)
        result = self._width_search.adjust(calls, self.removed, attempt)
        if not result.failures:
            if not training:
                self._evaluation = result
            return False
        self.writer.restore()
        self._keep_more(calls, training, result.failures)
        return True

    def _raise_error_of_model(
        self, result: PassResult, example_inputs: Any, calls: list[RecordedCall], training: bool
    ) -> None:
        """Raise the error of the network's code if the dense network raises one too."""
        if training in self._runs_dense:
            return
        self.writer.restore()
        none = torch.zeros_like(self.removed)
        again = run_pass(self.model, example_inputs, calls, none, training=training)
        if again.error is not None:
            raise UserError(again.error)
        self._runs_dense.add(training)

    def _values_differ(self, example_inputs: Any) -> bool:
        """Whether the outputs differ from those of the network in which these channels are zero."""
        own = {name: value for name, (_, value) in self.writer.attributes.items()}
        pruned = self._evaluation.outputs
        self.writer.restore()
        zeroed = self._run_zeroed(example_inputs)
        if zeroed.failures or not any(map(differs, pruned, zeroed.outputs)):
            self.writer.write(own)
            return False
        zeroed = self._run_zeroed(example_inputs, fingerprints=True)
        self.writer.write(own)
        result = run_pass(self.model, example_inputs, self.calls, self.removed, fingerprints=True)
        self.writer.restore()
        number = first_difference(result, zeroed)
        if number is None:
            number = len(self.calls) - 1
        self._keep_more(self.calls, False, {number: VALUES})
        return True

    def _run_zeroed(self, example_inputs: Any, *, fingerprints: bool = False) -> PassResult:
        with self.writer.zeroed():
            return run_pass(
                self.model,
                example_inputs,
                self.calls,
                self.removed,
                zeroed=True,
                fingerprints=fingerprints,
            )

    def _keep_more(
        self, calls: list[RecordedCall], training: bool, failures: Mapping[int, str]
    ) -> None:
        """Tie groups of channels where the network failed, or else keep its channels."""
        self._failed[self.removed.numpy().tobytes()] = calls, training, failures
        similar = self._similar.get(training) or SimilarCalls(
            dict(self.model.named_modules()), calls
        )
        self._similar[training] = similar
        scaled = set(attention_heads.scaled_heads(similar, failures, self.removed))
        if heads := scaled - self.tried_heads:
            raise WholeHeads(heads, True)
        if self._ties.attempt(similar, training, set(failures), self.removed):
            return
        positions = {
            (c.path[-1], c.shapes[0][-1])
            for c in map(calls.__getitem__, failures)
            if c.name in VIEWS and c.shapes[0]
        }
        if heads := positions & set(self.graph.whole_heads):
            raise WholeHeads(heads, False)
        for number, why in self._with_similar(failures, similar).items():
            self._freeze(similar, number, why, number in failures)
        self.groups.update()

    def _with_similar(self, failures: Mapping[int, str], similar: SimilarCalls) -> dict[int, str]:
        """Add all similar calls to those that failed, if one of these failed before."""
        # If the network's code stops or takes another branch, or values differ, the calls after it
        # are not reached. Without this, each of them would take a pass.
        found = dict(failures)
        for number, why in failures.items():
            if why != VALUES and not why.startswith("code: "):
                continue  # one pass finds all of these
            path = similar.owner(number)
            key = (type(similar.modules[path]), similar.calls_in[path].index(number), why)
            self._num_failed[key] += 1
            if self._num_failed[key] > 1:
                for _, other in similar.to(path, number):
                    found.setdefault(other, why)
        return found

    def _freeze(self, similar: SimilarCalls, number: int, why: str, failed: bool) -> None:
        """Keep the channels that a call uses, or else those used by the calls around it."""
        calls = similar.calls
        call = calls[number]
        axes = [axis for axis in call.axes if self.removed[axis.ids].any()]
        if why.startswith("code: ") and number and call.name not in CHECKS_SIZES:
            # The code read the size of a tensor that it had, and did not reach this call.
            before = calls[number - 1].output_axes
            if own := [a for axes in before for a in axes if self.removed[a.ids].any()]:
                axes, call = own, calls[number - 1]
            elif not failed:
                return
        if not axes and not failed:
            return
        if not axes:
            for n in reversed(
                similar.calls_in[call.path[-1]]
            ):  # its numbers may come from these calls
                other = calls[n]
                if n < number and other.path == call.path:
                    axes = [axis for axis in other.axes if self.removed[axis.ids].any()]
                    if any(self.removed[axis.ids].any() for axis in other.inputs):
                        break
                    axes = []
        if not axes and why.startswith("code: "):
            axes = self._next_removed(calls, number)
        for path in reversed(call.path):
            if axes:
                break
            near = [calls[n] for n in similar.calls_in[path]]
            axes = [axis for c in near for axis in c.axes if self.removed[axis.ids].any()]
        if not axes:
            raise NondeterministicModel(call.name, call.path[-1])
        self.graph.freeze(axes, why_kept(call.name, call.path[-1], why))

    def _next_removed(self, calls: Sequence[RecordedCall], number: int) -> list[Axis]:
        """The removed axes of the next call: the code may have read the size of its inputs."""
        for call in calls[number : number + NEXT]:
            if axes := [axis for axis in call.axes if self.removed[axis.ids].any()]:
                return axes
        return []


class NondeterministicModel(Exception):  # noqa: N818 (users get a ValueError)
    """A call differs from the recorded one although no channels are removed."""

    def __init__(self, name: str, path: str) -> None:
        super().__init__()
        self.name = name
        self.path = path
