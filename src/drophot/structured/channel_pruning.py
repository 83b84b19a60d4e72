"""Removes channels from a network: `prune_channels`.

How a network is pruned, and which module to read for it:

1. `tracer` records one forward pass, operator by operator. Every dimension of every parameter
   starts as a row of entries that can be removed (`dependency_graph`).
2. Each operator couples entries that have to be removed together and freezes those that have to
   be kept: by its rule (`layer_rules` has the table; a user's rule is in the same table), or else
   by calling it with fewer entries (`entry_trials`).
3. `channel_groups` ranks the channels, which are sets of coupled entries, by `importance`.
4. `network_writer` writes the smaller tensors into the network, and `passes` runs it. Each call
   must return the expected shape (`verification`); attributes that the code reads as widths are
   found and changed (`width_search`).
5. The outputs must equal those of the network in which the channels are zero (`zeroed_network`).
   If a check fails, `rewriter` freezes the channels and repeats step 3.
6. `explanation` says for each layer why it kept channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import nn

from drophot._core.importance import Importance, check_importance
from drophot._core.interruptions import must_propagate
from drophot._core.ratios import check_prune_ratio, num_removed
from drophot.prune import prunable_weights
from drophot.prune.model_summary import Summary, summary
from drophot.structured import reasons, single_call, tracer, width_attributes
from drophot.structured.attention_heads import WholeHeads
from drophot.structured.importance import squared_magnitude
from drophot.structured.layer_rules import RULES
from drophot.structured.observations import InternalError, UserError
from drophot.structured.operator_call import Rule, with_custom_rules
from drophot.structured.pruning_result import Change, Pruned
from drophot.structured.rewriter import NondeterministicModel, Rewriter


def prune_channels(
    model: nn.Module,
    ratio: float,
    example_inputs: Any,
    *,
    skip: Iterable[str] = (),
    importance: Importance | None = None,
    rules: Mapping[Any, Callable[..., None]] | None = None,
) -> Pruned:
    """Remove a share `ratio` of the channels, those of the least magnitude, in place.

    `ratio` is the share **removed** of each set of channels that are ranked together: the outputs
    of a layer, or of the layers that a residual connection couples, which lose the same channels.
    Of `n` channels, `floor(ratio * n + 0.5)` are removed, and at least one is kept. Attention loses
    the same number of channels in each head; if its scale depends on the width of a head, it loses
    whole heads instead, or keeps all of them and is named in `unpruned_layers`. A grouped
    convolution loses the same number of channels in each group, or whole groups if it has more
    groups than channels per group. Inputs and outputs of the network keep their shape.
    Parameters and operations shrink by about `1 - (1 - ratio)²`, since a layer loses inputs too;
    the result has the shares that were achieved.

    The score of a channel is a sum over every Conv and Linear layer and attention projection that
    produces or reads it: the importance of its weights there, divided by the mean over the channels
    that it is ranked with, so that coupled layers have equal weight. By default, the importance of
    a weight is its square.

    Coupled channels are found in a forward pass, operator by operator, and the pruned network is
    checked in further passes. Where an operator or the network's own code cannot work with fewer
    channels, they are kept, and the result says so. The model remains a plain module of the same
    class: it trains, saves and exports as before. Create a new optimizer for it.

    References:
        Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017,
        https://arxiv.org/abs/1608.08710. Fang et al., DepGraph: Towards Any Structural Pruning,
        CVPR 2023, https://arxiv.org/abs/2301.12900: coupled channels, ranked as one.

    Args:
        model: Any module that runs eagerly, on any device.
        ratio: The share removed, in [0, 1).
        example_inputs: A tensor, a tuple of the model's positional arguments or a dict of its
            keyword arguments, on the model's device; two samples are enough.
        skip: Names of modules or parameters that keep their shape, as in `model.named_modules()`;
            a module's name includes everything in it.
        importance: A function `(name, weight) -> Tensor` of values that are at least 0, higher for
            what should be kept. It returns one value per output channel, of shape `(C_out,)`: along
            dimension 0 of `weight`, or dimension 1 for transposed convolutions and for parameters
            that are multiplied from the right, as in `x @ weight`. Or it returns one value per
            weight, in the shape of `weight`; these are summed for each channel, and the layers that
            read the channel count too. The default is the square of each weight.
        rules: Functions by operator, for operators of your own: the result of
            `torch.library.custom_op`, `torch.ops.<namespace>.<name>` or `"namespace::name"`. A
            function
            `rule(call, *args, **kwargs)` takes an `OperatorCall` and the operator's arguments, and
            calls `call.couple` for dimensions that lose the same entries. It replaces a built-in
            rule. See "Prune through your own operators" in the documentation.

    Returns:
        The counts before and after, the channels that each layer kept, and the reasons.

    Raises:
        TypeError: If `ratio` is not a number, a weight does not have a floating-point dtype,
            `importance` is not a function of a name and a weight, `rules` does not map operators to
            functions that take their arguments, or a rule does not pass pairs to `couple`.
        ValueError: If `ratio` is not in [0, 1), a name in `skip` is unknown, the model does not
            take `example_inputs`, `importance` returns another shape or values that are negative or
            not finite, a rule couples dimensions that do not exist or differ in size, no channel
            can be removed, or a weight in a layer that `skip` does not name is not finite, has no
            data yet, is sharded or is computed by a parametrization. The model is unchanged then.
        RuntimeError: If drophot itself fails, with a message that says so. Errors of your own code
            (of the model, `importance` or a rule), of a signal handler and of running out of memory
            are raised unchanged.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> pruned = prune_channels(model, 0.5, torch.ones(1, 4))
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )
        >>> pruned.channels, round(pruned.parameters.removed, 2)
        (Change(before=10, after=6), 0.48)
    """
    ratio = check_prune_ratio("ratio", ratio)
    check_importance("importance", importance)
    prunable_weights.check_module("model", model)
    left_out = prunable_weights.left_out(model, skip)
    weights = prunable_weights.with_channels(model, left_out)
    prunable_weights.check_finite(weights)
    try:
        return _prune(
            model,
            ratio,
            example_inputs,
            weights,
            left_out,
            importance or squared_magnitude,
            with_custom_rules(RULES, rules),
        )
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
            f"`prune_channels` failed with {type(error).__name__}: {error}. This is a bug in "
            f"drophot, not in your model, which is unchanged; please report it. Passing the names "
            f"of unusual modules as `skip=` may avoid it."
        ) from error


_KINDS = ("builtins", "torch")  # modules of the errors that drophot's own code can raise

# Errors that drophot's own code raises only if it has a bug.
_BUGS = (
    *(AssertionError, AttributeError, LookupError, RuntimeError, ArithmeticError),
    *(StopIteration, NameError, RecursionError, UnboundLocalError),
)


def _prune(
    model: nn.Module,
    ratio: float,
    example_inputs: Any,
    weights: Mapping[str, nn.Parameter],
    left_out: Collection[int | str],
    importance: Importance,
    rules: Mapping[object, Rule],
) -> Pruned:
    """Remove channels; start again where heads can or cannot be removed as a whole."""
    whole_heads: set[tuple[str, int]] = set()
    tried: set[tuple[str, int]] = set()
    before = None
    while True:
        graph, calls, training = tracer.record(model, example_inputs, whole_heads, rules)
        before = before or _summary(model, example_inputs)
        for name, parameter in model.named_parameters():
            if id(parameter) in left_out:
                graph.freeze(graph.axes_of(parameter), f"`skip` names {name}")
            elif parameter not in graph.axes:
                graph.freeze(graph.axes_of(parameter), reasons.UNUSED)
        rewriter = Rewriter(model, graph, calls, weights, ratio, importance, training, tried)
        try:
            rewriter.run(example_inputs)
            break
        except WholeHeads as error:
            tried |= error.heads
            whole_heads = whole_heads | error.heads if error.possible else whole_heads - error.heads
    try:
        return _result(model, ratio, example_inputs, rewriter, before)
    except BaseException:
        rewriter.writer.restore()
        raise


def _result(
    model: nn.Module, ratio: float, example_inputs: Any, rewriter: Rewriter, before: Summary
) -> Pruned:
    """The counts before and after, and why channels were kept."""
    kept, (unpruned, partly) = rewriter.kept_channels(), rewriter.reasons()
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
    after = _summary(model, example_inputs)
    requested = {
        name: min(num_removed(change.before, ratio), change.before - 1)
        for name, change in layers.items()
    }
    not_removed: dict[str, int] = {}
    for name, change in layers.items():
        if fewer := requested[name] - (change.before - change.after):
            why = unpruned.get(name) or partly[name]
            not_removed[why] = not_removed.get(why, 0) + fewer
    return Pruned(
        ratio=ratio,
        channels=Change(outputs, left),
        parameters=Change(before.parameters, after.parameters),
        flops=Change(before.counted_flops or 0, after.counted_flops or 0),
        bytes=Change(before.bytes, after.bytes),
        layers=layers,
        kept_channels=kept,
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
