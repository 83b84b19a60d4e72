"""One run of structured pruning, from the recording of a network to the result."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from drophot._core.budget import UNITS, Budget
from drophot._core.importance import Importance
from drophot._core.ratios import check_prune_ratio, num_removed
from drophot.prune.latency import latency
from drophot.prune.model_summary import Summary, summary
from drophot.structured import attention_heads, reasons, single_call, tracer, width_attributes
from drophot.structured.attention_heads import WholeHeads
from drophot.structured.budget_selection import BudgetSelection, Unreachable, UnreachableBudgetError
from drophot.structured.channel_groups import ChannelGroups
from drophot.structured.dependency_graph import DependencyGraph
from drophot.structured.explanation import explain
from drophot.structured.operator_call import Rule
from drophot.structured.planned_selection import PlannedSelection, check_fits
from drophot.structured.pruning_result import Change, Pruned
from drophot.structured.recorded_call import RecordedCall
from drophot.structured.rewriter import Rewriter

_LATENCY_STEPS = 6  # of the bisection, after the two ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Which channels are to be removed: one of `ratio`, `budget` and `planned` is set."""

    ratio: float | None = None
    budget: Budget | None = None
    planned: Mapping[str, Collection[int]] | None = None
    """The outputs to remove, by the weight's name."""
    planned_sizes: Mapping[str, int] | None = None
    """The number of outputs of each layer of the planned network, by the weight's name."""
    whole_heads: Collection[tuple[str, int]] = ()
    """Modules, and the width of the heads in them that are removed only as a whole."""

    @staticmethod
    def of(ratio: float | None, budget: Budget | None) -> Request:
        """The request of a user, who gives either a ratio or a budget."""
        if isinstance(ratio, Budget):
            raise TypeError(
                f"`ratio` must be a number, got {ratio!r}. Pass a budget by name: to={ratio!r}."
            )
        if budget is None:
            if ratio is None:
                raise TypeError(
                    "`ratio` or `to` must be given, got neither. Pass ratio=0.5 to remove half of "
                    "the channels of each layer, or to=Budget(parameters=1_000_000)."
                )
            return Request(ratio=check_prune_ratio("ratio", ratio))
        if not isinstance(budget, Budget):
            raise TypeError(
                f"`to` must be a Budget, got {budget!r}. Pass to=Budget(parameters=1_000_000), for "
                f"example."
            )
        if ratio is not None:
            raise TypeError(
                f"`ratio` and `to` must not both be given, got {ratio!r} and {budget!r}. Leave one "
                f"out."
            )
        return Request(budget=budget)


class PruningRun:
    """Prunes a network; afterwards `rewriter` can restore it.

    Args:
        model: The network.
        example_inputs: The inputs to call it with.
        request: What is to be removed.
        weights: The weights of Conv and Linear layers, by name.
        left_out: The parameters and modules that keep their shape.
        importance: The importance of weights or of output channels.
        rules: The rules of operators.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        request: Request,
        weights: Mapping[str, nn.Parameter],
        left_out: Collection[int | str],
        importance: Importance,
        rules: Mapping[object, Rule],
    ) -> None:
        self.model = model
        self.example_inputs = example_inputs
        self.request = request
        self.weights = weights
        self.left_out = left_out
        self.importance = importance
        self.rules = rules
        self.whole_heads = set(request.whole_heads)
        self._latency: tuple[float, float] | None = None

    def run(self) -> Pruned:
        """Remove the channels; if this fails, the network is unchanged."""
        self._prune()
        try:
            return self._result()
        except BaseException:
            self.rewriter.writer.restore()
            raise

    def _prune(self) -> None:
        """Remove channels; start again where heads can or cannot be removed as a whole."""
        model, budget = self.model, self.request.budget
        tried: set[tuple[str, int]] = set(self.whole_heads)
        before = None
        while True:
            graph, calls, training = tracer.record(
                model, self.example_inputs, self.whole_heads, self.rules
            )
            if budget is not None and budget.whole_heads and before is None:
                self.whole_heads = attention_heads.all_heads(calls)
                tried |= self.whole_heads
                before = _summary(model, self.example_inputs)
                continue
            before = before or _summary(model, self.example_inputs)
            for name, parameter in model.named_parameters():
                if id(parameter) in self.left_out:
                    graph.freeze(graph.axes_of(parameter), f"`skip` names {name}")
                elif parameter not in graph.axes:
                    graph.freeze(graph.axes_of(parameter), reasons.UNUSED)
            self.before = before
            try:
                self._rewrite(graph, calls, training, tried)
                return
            except WholeHeads as error:
                tried |= error.heads
                if error.possible:
                    self.whole_heads |= error.heads
                else:
                    self.whole_heads -= error.heads

    def _rewrite(
        self,
        graph: DependencyGraph,
        calls: list[RecordedCall],
        training: list[RecordedCall],
        tried: set[tuple[str, int]],
    ) -> None:
        """Remove channels as requested."""
        request, model = self.request, self.model
        self.rewriter = Rewriter(
            model,
            graph,
            calls,
            self.weights,
            request.ratio,
            self.importance,
            training,
            tried,
            self.left_out,
        )
        if request.planned is not None:
            sizes = {
                name: weight.shape[self.rewriter.output_dim(name)]
                for name, weight in self.rewriter.weights.items()
            }
            check_fits(request.planned_sizes or {}, sizes)
            select = PlannedSelection(request.planned, self.rewriter.output_entries())
            self.rewriter.run(self.example_inputs, select)
        elif request.budget is not None:
            self._fit(
                BudgetSelection(model, graph, calls, self.example_inputs, request.budget),
                request.budget,
            )
        else:
            ratio = request.ratio or 0.0

            def share(groups: ChannelGroups, scores: Any) -> Any:
                return groups.select(ratio, scores)

            self.rewriter.run(self.example_inputs, share)

    def _fit(self, selection: BudgetSelection, budget: Budget) -> None:
        """Remove channels until the network, as it is measured, fits the budget."""
        limit = budget.flops
        if limit is not None and self.before.flops is None:
            names = ", ".join(self.before.uncounted)
            raise ValueError(
                f"`to` must limit what can be counted, but the FLOPs of {names} are unknown, got "
                f"{budget!r}. Register a formula with "
                f"torch.utils.flop_counter.register_flop_formula, or limit something else."
            )
        try:
            while True:
                self._fit_latency(selection, budget)
                if limit is None:
                    return
                # The recorded products may cost less than those that are called.
                found = _summary(self.model, self.example_inputs).counted_flops or 0
                if found <= limit:
                    return
                self.rewriter.writer.restore()
                # At least one operation less, so that each round removes more.
                fewer = selection.limits["flops"] * limit / found
                selection.limits["flops"] = min(fewer, selection.limits["flops"] - 1)
        except Unreachable as error:
            self.rewriter.removed = error.removed
            raise self._unreachable(error, budget, selection) from None
        except BaseException:
            self.rewriter.writer.restore()
            raise

    def _fit_latency(self, selection: BudgetSelection, budget: Budget) -> None:
        limit = budget.latency
        if limit is None:
            self.rewriter.run(self.example_inputs, selection)
            return
        dense = self._latency[0] if self._latency is not None else self._measured()

        def at(share: float) -> float:
            self.rewriter.writer.restore()
            selection.share = share
            self.rewriter.run(self.example_inputs, selection)
            return self._measured()

        found = at(0.0)
        if found > limit:
            found = at(1.0)
            low, high, last = 0.0, 1.0, 1.0
            for _ in range(_LATENCY_STEPS if found <= limit else 0):
                last = (low + high) / 2
                if at(last) <= limit:
                    high = last
                else:
                    low = last
            if found <= limit:
                # The least of several noisy times is too low, so that of the result is measured.
                found = self._measured() if last == high else at(high)
            step = 2**-_LATENCY_STEPS
            while found > limit and high < 1:
                high, step = min(high + step, 1.0), 2 * step
                found = at(high)
            if found > limit:
                removed = self.rewriter.removed
                self.rewriter.writer.restore()
                raise Unreachable("latency", found, removed)
        self._latency = dense, found

    def _measured(self) -> float:
        with single_call.preserved_state(self.model):
            return latency(self.model, self.example_inputs)

    def reasons(self) -> tuple[dict[str, str], dict[str, str]]:
        """Why layers and embeddings kept all channels, and other layers some, by weight."""
        rewriter = self.rewriter
        embeddings = {
            f"{path}.weight".removeprefix(".")
            for path, module in self.model.named_modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        }
        axes = {
            name: [axis for axis in rewriter.graph.axes_of(tensor) if axis.dim == 1]
            for tensor, name in rewriter.graph.names.items()
            if name in embeddings - rewriter.weights.keys() and tensor.shape[1] > 1
        }
        kept, _ = explain(
            rewriter.graph, rewriter.groups, rewriter.removed, axes, self.request.ratio
        )
        unpruned, partly = rewriter.reasons()
        return unpruned | kept, partly

    def _unreachable(
        self, error: Unreachable, budget: Budget, selection: BudgetSelection
    ) -> ValueError:
        unpruned, partly = self.reasons()
        largest = []
        if error.limit in ("parameters", "bytes"):
            for name, count in selection.largest(error.limit, error.removed):
                why = f": {unpruned[name]}" if name in unpruned else ""
                largest.append(f"{count:,} in `{name}` ({count / error.least:.1%}{why})")
        counts: dict[str, int] = {}
        for name, why in (unpruned | partly).items():
            if why != reasons.RANKED and name in self.rewriter.weights:
                kept = len(self.rewriter.kept_channels()[name])
                counts[why] = counts.get(why, 0) + kept
        most = [f"{count:,} channels: {why}" for count, why in reasons.merged(counts)[:3]]
        return UnreachableBudgetError(
            budget,
            f"at least {error.least:,.6g} {UNITS[error.limit]}",
            f"{', of which ' * bool(largest)}{', '.join(largest)}"
            f"{'; kept are ' * bool(most)}{'; '.join(most)}",
        )

    def _result(self) -> Pruned:
        """The counts before and after, and why channels were kept."""
        rewriter, before, ratio = self.rewriter, self.before, self.request.ratio
        kept, (unpruned, partly) = rewriter.kept_channels(), self.reasons()
        layers = {
            name: Change(weight.shape[rewriter.output_dim(name)], len(kept[name]))
            for name, weight in rewriter.weights.items()
        }
        outputs, left = (sum(change[i] for change in layers.values()) for i in range(2))
        if ratio and left == outputs:
            found = [f"{name}: {why}" for name, why in list(unpruned.items())[:5]]
            raise ValueError(
                f"`ratio` must remove at least one channel, but {ratio} removes none "
                f"({'; '.join(found)}). Pass a higher ratio, or prune single weights with "
                f"`magnitude_prune`."
            )
        after = _summary(self.model, self.example_inputs)
        requested = {
            name: change.before - change.after
            if ratio is None
            else min(num_removed(change.before, ratio), change.before - 1)
            for name, change in layers.items()
        }
        not_removed: dict[str, int] = {}
        for name, change in layers.items():
            if fewer := requested[name] - (change.before - change.after):
                why = unpruned.get(name) or partly[name]
                not_removed[why] = not_removed.get(why, 0) + fewer
        return Pruned(
            ratio=ratio,
            budget=self.request.budget,
            channels=Change(outputs, left),
            parameters=Change(before.parameters, after.parameters),
            flops=Change(before.counted_flops or 0, after.counted_flops or 0),
            bytes=Change(before.bytes, after.bytes),
            latency=self._latency,
            layers=layers,
            kept_channels=kept,
            kept_norm_channels=rewriter.kept_norm_channels(),
            unpruned_layers=unpruned,
            num_requested=sum(requested.values()),
            not_removed={why: count for why, count in not_removed.items() if count > 0},
            unpruned_parameters=rewriter.writer.unpruned(rewriter.weights),
            attributes={
                f"{path}.{width_attributes.as_code(key)}".removeprefix("."): Change(*values)
                for (path, key), values in rewriter.writer.attributes.items()
            },
            description=rewriter.writer.description(),
        )


def _summary(model: nn.Module, example_inputs: Any) -> Summary:
    """The summary of a network, without gradients because torch's FLOP counter needs that."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        with single_call.preserved_state(model):
            return summary(model, example_inputs, batch_sizes=())
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
