"""What pruning says, and how much of a model is zero."""

import warnings
from collections.abc import Callable
from pathlib import Path

from torch import nn

TESTS = Path(__file__).parents[1]


def zeros(model: nn.Module) -> float:
    """Of all weights of two dimensions or more, embeddings and biases left out."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    weights = [
        weight
        for name, weight in model.named_parameters()
        if weight.dim() > 1
        and not name.endswith("bias")
        and (id(weight) not in embeddings or id(weight) in heads)
    ]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def warned(prune: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        prune()
    assert all(one.filename.startswith(str(TESTS)) for one in found)
    return [str(one.message) for one in found]
