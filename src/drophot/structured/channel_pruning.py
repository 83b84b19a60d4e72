"""Removes channels from a network: `prune_channels`.

How a network is pruned, and which module to read for it:

1. `tracer` records one forward pass, operator by operator. Every dimension of every parameter
   starts as a row of entries that can be removed (`dependency_graph`).
2. Each operator couples entries that have to be removed together and freezes those that have to
   be kept: by its rule (`layer_rules` has the table; a user's rule is in the same table), or else
   by calling it with fewer entries (`entry_trials`).
3. `channel_groups` ranks the channels, which are sets of coupled entries, by `importance`. For a
   budget, `global_ranking` orders the channels of all layers, and `budget_selection` removes no
   more than `network_cost` requires; a plan names the channels (`planned_selection`). Its JSON is
   checked in `stored_plan`, and `model_names` finds its names in a wrapped model.
4. `network_writer` writes the smaller tensors into the network, and `passes` runs it. Each call
   must return the expected shape (`verification`); attributes that the code reads as widths are
   found and changed (`width_search`).
5. The outputs must equal those of the network in which the channels are zero (`zeroed_network`).
   If a check fails, `tie_trials` ties layers that have to lose equally many, or `rewriter`
   freezes the channels, and step 3 is repeated.
6. `explanation` says for each layer why it kept channels.

`pruning_run` goes through these steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from drophot._core.budget import Budget
from drophot._core.importance import Importance
from drophot.structured.guarded_run import prune
from drophot.structured.pruning_result import Pruned
from drophot.structured.pruning_run import Request


def prune_channels(
    model: nn.Module,
    ratio: float | None = None,
    example_inputs: Any = None,
    *,
    to: Budget | None = None,
    skip: Iterable[str] = (),
    importance: Importance | None = None,
    rules: Mapping[Any, Callable[..., None]] | None = None,
) -> Pruned:
    """Remove the channels of the least magnitude, a share of each layer or to a budget, in place.

    `ratio` is the share **removed** of each set of channels that are ranked together: the outputs
    of a layer, or of the layers that a residual connection couples, which lose the same channels.
    Of `n` channels, `floor(ratio * n + 0.5)` are removed, and at least one is kept. Attention loses
    the same number of channels in each head; if its scale depends on the width of a head, it loses
    whole heads instead, or keeps all of them and is named in `unpruned_layers`. A grouped
    convolution loses the same number of channels in each group, or whole groups if it has more
    groups than channels per group. Inputs and outputs of the network keep their shape.
    Parameters and operations shrink by about `1 - (1 - ratio)²`, since a layer loses inputs too;
    the result has the shares that were achieved.

    With `to` instead of `ratio`, the channels of all layers are ranked together, and no more are
    removed than the budget needs: no layer could keep one more channel (or `round_to` more, or one
    more in each head). Only latency is not met as closely: it is measured, by bisection, and met to
    about 1/64 of the ranking and to the noise of the measurement. About nine networks are tried,
    and a few more if the last measurement is above the limit. A channel's rank is its score,
    divided by the mean score of the channels that its layer still has at that point, times the
    sensitivity of the layer: the relative change of the outputs for the example inputs when the
    half of its channels that rank lowest is zero, between a tenth and ten times the median of the
    layers.

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
        CVPR 2023, https://arxiv.org/abs/2301.12900: coupled channels, ranked as one, with scores
        relative to the mean. Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning,
        ICLR 2021, https://arxiv.org/abs/2010.07611: scores relative to what a layer still has.

    Args:
        model: Any module that runs eagerly, on any device. It may be compiled.
        ratio: The share removed, in [0, 1). Pass either this or `to`.
        example_inputs: A tensor, a tuple of the model's positional arguments or a dict of its
            keyword arguments, on the model's device; two samples are enough.
        to: What the network may cost at most, in parameters, FLOPs, bytes or milliseconds, such as
            `Budget(parameters=1_000_000)`.
        skip: Names of modules or parameters that keep their shape, as in `model.named_modules()`;
            a module's name includes everything in it. `importance` is not called for them.
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
        TypeError: If `ratio` is not a number, `to` is not a `Budget`, both or neither are given, a
            weight does not have a floating-point dtype, `importance` is not a function of a name
            and a weight, `rules` does not map operators to functions that take their arguments, or
            a rule does not pass pairs to `couple`.
        ValueError: If `ratio` is not in [0, 1), `to` cannot be reached or limits FLOPs that cannot
            be counted, a name in `skip` is unknown, the model does not take `example_inputs` or has
            adapters that `skip` does not name,
            `importance` returns another shape or values that are negative or not finite, a rule
            couples dimensions that do not exist or differ in size, `ratio` removes no channel, the
            model or a module in it is a result of TorchScript or torch.export, all of its layers
            are quantized, or a weight in a layer that `skip` does not name is not finite, has no
            data yet, is sharded, is packed by a quantized layer or is computed by a
            parametrization. The model is unchanged then.
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
    pruned, _ = prune(
        "prune_channels",
        model,
        Request.of(ratio, to),
        example_inputs,
        skip=skip,
        importance=importance,
        rules=rules,
    )
    return pruned
