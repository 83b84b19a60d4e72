"""Importances of weights and channels from papers, for `importance=`.

Each is a function of a parameter's name and the parameter: `l1`, `l2` and `layer_normalized` are
functions, the others are classes whose instances are. Pass one to `magnitude_prune`, `Schedule`,
`prune_channels`, `plan_channels` or `DropHot` as `importance=`, and several to `Grid` as
`importances=`. `FromBatches` is for those of a run that are computed from its trained network.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from drophot._core import scalars
from drophot._core.importance import FromBatches
from drophot.prune import prunable_weights
from drophot.prune.current_parameters import without_wrappers
from drophot.prune.importance_batches import BatchLoss
from drophot.prune.importance_statistics import (
    batch_norms,
    computed_otherwise,
    input_norms,
    mean_over_batches,
    stored,
    weight_layers,
    widened,
)
from drophot.prune.linear_layers import input_dimension
from drophot.prune.parameter_values import ParameterValues

__all__ = [
    "BatchNormScale",
    "Fisher",
    "FromBatches",
    "Random",
    "Taylor",
    "Wanda",
    "l1",
    "l2",
    "layer_normalized",
]


def l1(name: str, weight: Tensor) -> Tensor:
    """The absolute value of each weight; summed over a channel, its L1 norm.

    References:
        Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017,
        https://arxiv.org/abs/1608.08710.

    Args:
        name: The name of the parameter.
        weight: The parameter, of any shape.

    Returns:
        The importances, in the shape of the weight.

    Example:
        >>> l1("weight", torch.tensor([3.0, -4.0]))
        tensor([3., 4.])
    """
    return weight.detach().abs()


def l2(name: str, weight: Tensor) -> Tensor:
    """The square of each weight; summed over a channel, its squared L2 norm.

    It is the default of `prune_channels`, and ranks single weights as `l1` does.

    Args:
        name: The name of the parameter.
        weight: The parameter, of any shape.

    Returns:
        The importances, in the shape of the weight; float32 for dtypes of 16 bits.

    Example:
        >>> l2("weight", torch.tensor([3.0, -4.0]))
        tensor([ 9., 16.])
    """
    return widened(weight.detach()).square()


def layer_normalized(name: str, weight: Tensor) -> Tensor:
    r"""The magnitude of each weight relative to its layer, :math:`|w_i| / \sqrt{\sum_j w_j^2}`.

    It makes magnitudes of different layers comparable in a global ranking. Large layers have small
    values, so they lose most. `prune_channels` normalizes scores itself.

    References:
        Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference,
        ICLR 2017, https://arxiv.org/abs/1611.06440 (layer-wise l2-normalization).

    Args:
        name: The name of the parameter.
        weight: The parameter, of any shape.

    Returns:
        The importances, in the shape of the weight; zeros if all weights are zero.

    Example:
        >>> layer_normalized("weight", torch.tensor([3.0, -4.0]))
        tensor([0.6000, 0.8000])
    """
    weight = widened(weight.detach())
    norm = weight.norm()
    return weight.abs() / norm if norm > 0 else torch.zeros_like(weight)


class Taylor:
    r"""The first-order estimate of how much the loss changes without a weight or a channel.

    For a weight it is the mean over the batches :math:`b` of :math:`(g_b w)^2`, with the gradient
    :math:`g_b` of the batch's loss. With `channels=True`, it is the mean of
    :math:`\left(\sum_i g_{b,i} w_i\right)^2` over the weights :math:`i` of each output channel, for
    `prune_channels`: contributions of opposite sign cancel. All gradients are computed in one pass
    over the batches, in evaluation mode; the model's own gradients are unchanged.

    References:
        Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019,
        https://arxiv.org/abs/1906.10771.

    Args:
        model: The model, in any mode, on any device.
        batches: Yields batches of inputs and targets, first and second in a tuple or list. The
            inputs are a tensor, a tuple or list of positional arguments or a dict of keyword
            arguments. A batch may also be a dict of keyword arguments, if the model's outputs
            have a `loss`, as models of Transformers compute it from `labels`. The `"index"` that
            `IndexedDataset` adds to a dict is not passed. Tensors are moved to the model's device.
        loss: A function of the outputs and the targets that returns a scalar, the mean over a
            batch. `None` is the cross-entropy or, if a batch is a dict, the `loss` of the outputs.
            If the batch is a dict, your function receives the whole dict as its second argument.
        channels: Whether to estimate output channels instead of single weights. Parameters that do
            not belong to a Conv, Linear, MultiheadAttention or Transformers' Conv1D layer have
            single weights, since their output dimension is not known.

    Raises:
        TypeError: If a batch has neither inputs and targets nor keyword arguments, or `loss` does
            not return a tensor.
        ValueError: If there is no batch, `loss` does not return a scalar that depends on the
            weights, or the outputs of a batch that is a dict have no `loss`.

    Example:
        >>> from drophot import magnitude_prune
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 2.0]]))
        >>> batches = [(torch.tensor([[3.0, 1.0]]), torch.zeros(1, 1))]
        >>> taylor = Taylor(model, batches, loss=lambda outputs, targets: outputs.mean())
        >>> taylor("weight", model.weight)  # (3 · 1)² and (1 · 2)²
        tensor([[9., 4.]])
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[object],
        loss: BatchLoss | None = None,
        *,
        channels: bool = False,
    ) -> None:
        dims = _output_dims(model)

        def estimate(name: str, weight: Tensor, gradient: Tensor) -> Tensor:
            change = weight * gradient
            if channels and (dim := dims.get(name)) is not None:
                change = change.sum([d for d in range(change.dim()) if d != dim])
            return change.square()

        self._channels = channels
        self._values = mean_over_batches(model, batches, loss, estimate)

    def __call__(self, name: str, weight: nn.Parameter) -> Tensor:
        """The importance of each weight, or of each output channel, `(C_out,)`."""
        return stored(self._values, name, None if self._channels else weight)


class Fisher:
    r"""The second-order estimate of how much the loss changes without a weight.

    It is :math:`\frac{1}{2} w^2 F`, where :math:`F` is the mean over the batches of the squared
    gradient of the batch's loss. With batches of one sample, :math:`F` is the diagonal of the
    empirical Fisher information, which replaces the Hessian of optimal brain damage. Larger batches
    are faster and average gradients before they are squared. `prune_channels` sums over the
    weights of a channel.

    References:
        LeCun et al., Optimal Brain Damage, NeurIPS 1989. Theis et al., Faster Gaze Prediction with
        Dense Networks and Fisher Pruning, 2018, https://arxiv.org/abs/1801.05787.

    Args:
        model: The model, in any mode, on any device.
        batches: As in `Taylor`.
        loss: As in `Taylor`.

    Raises:
        TypeError: As in `Taylor`.
        ValueError: As in `Taylor`.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 2.0]]))
        >>> batches = [(torch.tensor([[3.0, 1.0]]), torch.zeros(1, 1))]
        >>> fisher = Fisher(model, batches, loss=lambda outputs, targets: outputs.mean())
        >>> fisher("weight", model.weight)
        tensor([[4.5000, 2.0000]])
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[object], loss: BatchLoss | None = None
    ) -> None:
        self._values = mean_over_batches(
            model, batches, loss, lambda name, weight, gradient: gradient.square()
        )

    def __call__(self, name: str, weight: nn.Parameter) -> Tensor:
        """The importance of each weight, in its shape."""
        return stored(self._values, name, weight) * widened(weight.detach()).square() / 2


class Wanda:
    r"""The magnitude of each weight times the norm of its input, for Linear layers.

    Transformers' `Conv1D` is such a layer too. Other layers have no importance: name them in
    `skip`, also the MultiheadAttention layers, which do not call their output projection.

    The importance of the weight from input :math:`j` to output :math:`i` is
    :math:`|w_{ij}| \, \lVert x_j \rVert_2`, with the norm over all samples and tokens of the
    batches. The paper removes the same share of each output's weights; `pattern="2:4"` does so in
    each group of four, and `scope="layer"` removes the share from the layer as a whole.

    References:
        Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024,
        https://arxiv.org/abs/2306.11695.

    Args:
        model: The model, in any mode, on any device.
        batches: Yields batches: a tensor of inputs, a dict of keyword arguments, or a tuple or list
            with the inputs first, which are then a tensor, a tuple or list of positional arguments
            or a dict of keyword arguments. The `"index"` that `IndexedDataset` adds to a dict is
            not passed. The model is called in evaluation mode, on its device.

    Raises:
        TypeError: If a batch does not have inputs with a tensor first.
        ValueError: If there is no batch, or the model calls no Linear layer.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, -2.0]]))
        >>> wanda = Wanda(model, [torch.tensor([[3.0, 1.0], [4.0, 0.0]])])
        >>> wanda("weight", model.weight)  # 1 · 5 and 2 · 1
        tensor([[5., 2.]])
    """

    def __init__(self, model: nn.Module, batches: Iterable[object]) -> None:
        self._norms = input_norms(model, batches)

    def __call__(self, name: str, weight: nn.Parameter) -> Tensor:
        """The importance of each weight, in its shape, `(C_out, C_in)`."""
        norms = self._norms.get(name)
        if norms is None:
            raise ValueError(
                f"`Wanda` ranks the weights of Linear layers that its batches reach, got `{name}`. "
                f"Name it in `skip`."
            )
        sizes = zip(norms.shape, weight.shape, strict=False)
        if weight.dim() != 2 or any(norm not in (1, size) for norm, size in sizes):
            raise computed_otherwise(name, f"had {norms.numel():,} inputs", weight)
        return weight.detach().abs() * norms


class BatchNormScale:
    r"""The scale of the batch normalization that follows a layer, for `prune_channels`.

    The importance of an output channel of a Conv or Linear layer is the absolute value of the
    factor :math:`|\gamma|` that BatchNorm multiplies it with. Output channels without BatchNorm
    have the sum of their squared weights. Train with an L1 penalty on the scales, as in the paper,
    to make many of them small.

    References:
        Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017,
        https://arxiv.org/abs/1708.06519.

    Args:
        model: The model, in any mode.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments,
            with which the model is called once to find the BatchNorm layer that reads the output of
            each layer.

    Raises:
        ValueError: If no BatchNorm layer with a scale reads the output of a Conv or Linear layer.
            When it is called, if the parameter is not one of the model, or a BatchNorm follows it
            and it has other channels.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> _ = model[1].weight.data.copy_(torch.tensor([1.0, -0.5, 2.0]))
        >>> BatchNormScale(model, torch.ones(1, 2))("0.weight", model[0].weight)
        tensor([1.0000, 0.5000, 2.0000])
    """

    def __init__(self, model: nn.Module, example_inputs: object) -> None:
        norms, dims = batch_norms(model, example_inputs), _output_dims(model)
        self._layers: ParameterValues[tuple[_BatchNorm | None, int | None]] = ParameterValues(
            model, {name: (norms.get(name), dims.get(name)) for name, _ in model.named_parameters()}
        )

    def __call__(self, name: str, weight: nn.Parameter) -> Tensor:
        """The importance of each output channel, `(C_out,)`."""
        norm, dim = stored(self._layers, name, weight)
        if dim is None:  # the output dimension is not known
            return widened(weight.detach()).square()
        if norm is None:
            squares = widened(weight.detach()).square()
            return squares.sum([d for d in range(weight.dim()) if d != dim])
        if len(norm.weight) != weight.shape[dim]:
            raise computed_otherwise(name, f"had a BatchNorm of {len(norm.weight)}", weight)
        return norm.weight.detach().abs()


class Random:
    """Random numbers: the control that every other importance should be compared with.

    The numbers depend only on the seed and on the name and shape of the parameter, so that they are
    the same on every machine, for every call and for a compiled model. One seed also gives the same
    numbers in each run of a grid, whatever the seed of the run. To draw other numbers in each run,
    pass `FromBatches(random)` with this function, which reads the generator of the run::

        def random(model, batches):
            return Random(int(torch.randint(2**31, ())))

    Args:
        seed: Another seed gives other numbers.

    Raises:
        TypeError: If the seed is not an integer.

    Example:
        >>> weight = nn.Parameter(torch.ones(2, 3))
        >>> torch.equal(Random()("weight", weight), Random()("weight", weight))
        True
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = scalars.integer("seed", seed)

    def __call__(self, name: str, weight: nn.Parameter) -> Tensor:
        """The importance of each weight, in its shape, uniform in [0, 1)."""
        number = zlib.crc32(f"{self._seed} {without_wrappers(name)}".encode())
        generator = torch.Generator().manual_seed(number)
        numbers = torch.rand(weight.shape, generator=generator, device="cpu", dtype=torch.float32)
        return numbers.to(weight.device)


def _output_dims(model: nn.Module) -> dict[str, int]:
    """The dimension of each parameter that has its layer's outputs, by the parameter's name."""
    prunable_weights.check_module("model", model)
    dims: dict[str, int] = {}
    for name, module in weight_layers(model):
        if (inputs := input_dimension(module, "weight")) is not None:
            dims[name] = 1 - inputs
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            for part in ("in_proj", "q_proj", "k_proj", "v_proj"):
                if (weight := module._parameters.get(f"{part}_weight")) is not None:
                    dims[names[id(weight)]] = 0
    return dims
