"""The layers whose weights are matrices of linear maps, and the names of these weights."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.rnn import RNNCellBase
from torch.nn.parameter import is_lazy

# The output projection of an attention layer is a Linear. The weights of nn.RNN, LSTM and GRU
# depend on the layer: see `weights_of`.
PRUNABLE: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight",),
    _ConvNd: ("weight",),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    RNNCellBase: ("weight_ih", "weight_hh"),
    nn.Bilinear: ("weight",),
}

# Parameters that are looked up or added, not multiplied: the last word of the name says so, or, for
# positions, any word, unless another word says that it is a matrix.
_TABLES = re.compile(r"bias(es)?|pos|embed(s|dings?)?|tokens?|latents|prompts?")
_POSITIONS = re.compile(r"pos|positions?|positional")
_MATRICES = re.compile(r"proj|projection|weights?|kernel|matrix|linear")

_PACKED_DTYPES = (torch.int8, torch.uint8, torch.int32)


def weights_of(module: nn.Module) -> tuple[str, ...]:
    """The names of a layer's matrices, even if this one lacks some; none for unknown modules."""
    if isinstance(module, nn.RNNBase):  # of all layers and directions, and projections
        return tuple(name for name in module._flat_weights_names if name.startswith("weight_"))
    if is_conv1d(module):
        return ("weight",)
    return _weights_of_class(type(module))


@lru_cache(maxsize=256)
def _weights_of_class(layer: type[nn.Module]) -> tuple[str, ...]:
    return tuple(
        name for kind, names in PRUNABLE.items() if issubclass(layer, kind) for name in names
    )


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the Conv1D of Transformers, a Linear with a weight of shape (in, out).

    Transformers is not imported to find out.
    """
    if not _is_conv1d_class(type(module)):
        return False
    weight = getattr(module, "weight", None)
    return weight is None or (weight.dim() == 2 and weight.shape[1] == getattr(module, "nf", None))


@lru_cache(maxsize=256)
def _is_conv1d_class(layer: type[nn.Module]) -> bool:
    return any(
        kind.__name__ == "Conv1D" and kind.__module__.partition(".")[0] == "transformers"
        for kind in layer.__mro__
    )


def input_dimension(module: nn.Module, attribute: str) -> int | None:
    """The dimension of a weight that meets the inputs; `None` if unknown or ambiguous."""
    if attribute not in weights_of(module) or isinstance(module, nn.Bilinear):
        return None
    return 0 if isinstance(module, _ConvTransposeNd) or is_conv1d(module) else 1


def is_matrix(model: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether activations are multiplied by a parameter, as far as names and shapes tell.

    It then has two or more dimensions larger than 1, and neither its module nor its name says that
    it is looked up or added: an embedding, a norm, a bias, positions, or learned tokens.
    """
    if is_lazy(parameter) or sum(size > 1 for size in parameter.shape) < 2:
        return False
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if attribute in weights_of(module):
        return True
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return False
    kind = type(module).__name__.lower()
    if re.search(r"norm(\dd)?$", kind) or (attribute == "weight" and kind.endswith("embedding")):
        return False
    if isinstance(module, nn.ParameterList | nn.ParameterDict):
        attribute = f"{path.rpartition('.')[2]}_{attribute}"
    words = [word for word in attribute.lower().split("_") if word.isalpha()]
    while len(words) > 1 and words[-1] in ("u", "v"):  # one of a pair
        words.pop()
    if words and _TABLES.fullmatch(words[-1]):
        return False
    positions, matrices = (any(map(p.fullmatch, words)) for p in (_POSITIONS, _MATRICES))
    return matrices or not positions


def packed_weights(module: nn.Module) -> dict[str, int]:
    """The number of weights of a quantized layer in tensors that are not parameters, by name."""
    library = type(module).__module__
    if library.startswith("torch.") and ".quantized." in library:
        found: Any = getattr(module, "get_weight", dict)()
        if isinstance(found, dict) and found:  # of recurrent layers
            return {name: weight.numel() for name, weight in found.items()}
        weight: Any = getattr(module, "weight", None)
        weight = weight() if callable(weight) else weight
        matrix = isinstance(weight, Tensor) and "Embedding" not in type(module).__name__
        return {"weight": weight.numel()} if matrix else {}
    return {
        name: buffer.numel()
        for name, buffer in module._buffers.items()
        if buffer is not None
        and buffer.dtype in _PACKED_DTYPES
        and "weight" in name
        and sum(size > 1 for size in buffer.shape) > 1
    }
