"""The batches that importances are computed from: several inputs, and dicts with labels."""

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drophot.prune.importances import Fisher, Taylor, Wanda

INPUTS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.tensor([0, 1, 2, 0, 1, 2])


class Siamese(nn.Module):
    """A network of two inputs, which are not interchangeable."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head((self.layer(x) + 2 * self.layer(y)).relu())
        if labels is None:
            return logits
        return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits, labels))


class Encoding(UserDict[str, Tensor]):
    """A mapping that is not a dict, as Transformers' tokenizers return it."""


PAIR = (INPUTS, INPUTS.flip(0))
KEYWORDS: dict[str, Any] = dict(zip("xy", PAIR, strict=True))
INPUTS_OF_A_BATCH: dict[str, Any] = {
    "a tuple": PAIR,
    "a list, as a DataLoader makes of a tuple": [*PAIR],
    "a dict": KEYWORDS,
    "a dict of an IndexedDataset": {**KEYWORDS, "index": torch.arange(6)},
}


def siamese() -> Siamese:
    torch.manual_seed(0)
    return Siamese().double()


def siamese_gradient(model: Siamese) -> Tensor:
    loss = F.cross_entropy(model(*PAIR), TARGETS)
    return torch.autograd.grad(loss, model.layer.weight)[0]


@pytest.mark.parametrize("kind", INPUTS_OF_A_BATCH)
def test_batches_of_several_inputs(kind: str) -> None:
    model, inputs = siamese(), INPUTS_OF_A_BATCH[kind]
    weight = model.layer.weight
    expected = (siamese_gradient(model) * weight.detach()) ** 2
    torch.testing.assert_close(Taylor(model, [(inputs, TARGETS)])("layer.weight", weight), expected)
    fisher = Fisher(model, [[inputs, TARGETS]])("layer.weight", weight)
    torch.testing.assert_close(fisher, expected / 2)
    norms = torch.cat(PAIR).norm(dim=0)
    batches = [(inputs,), (inputs, TARGETS), *([inputs] if isinstance(inputs, dict) else [])]
    for batch in batches:
        found = Wanda(model, [batch])("layer.weight", weight).double()
        torch.testing.assert_close(found, weight.detach().abs() * norms, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [dict, Encoding])
def test_batches_of_keyword_arguments_have_the_loss_of_the_model(kind: Any) -> None:
    model, batch = siamese(), kind(**KEYWORDS, labels=TARGETS, index=torch.arange(6))
    weight = model.layer.weight
    expected = (siamese_gradient(model) * weight.detach()) ** 2
    torch.testing.assert_close(Taylor(model, [batch])("layer.weight", weight), expected)
    torch.testing.assert_close(Fisher(model, [batch])("layer.weight", weight), expected / 2)
    Wanda(model, [batch])

    def twice(outputs: Any, given: dict[str, Tensor]) -> Tensor:
        assert "index" not in given
        return 2 * F.cross_entropy(outputs.logits, given["labels"])

    found = Taylor(model, [batch], twice)("layer.weight", weight)
    torch.testing.assert_close(found, 4 * expected)
    without = {name: value for name, value in batch.items() if name != "labels"}
    with pytest.raises(ValueError, match=r"`batches`.*`loss`.*Tensor"):
        Taylor(model, [without])


def test_batches_that_the_model_does_not_take() -> None:
    model = siamese()
    for create in (
        lambda: Taylor(model, [({"x": INPUTS, "z": INPUTS}, TARGETS)]),
        lambda: Wanda(model, [{"x": INPUTS, "z": INPUTS}]),
    ):
        with pytest.raises(TypeError, match=r"(?s)'z'.*x, z.*`batches`"):
            create()
    with pytest.raises(TypeError, match=r"(?s)'y'.*`batches`.*tuple"):
        Wanda(model, [PAIR])  # the second is not an input
    for wrong in ({"x": 1}, (), ("a", "b"), None):
        with pytest.raises(TypeError, match=r"`batches`"):
            Wanda(model, [wrong])
        with pytest.raises(TypeError, match=r"`batches`"):
            Taylor(model, [(wrong, TARGETS)])


class EmptyLoss(nn.ModuleList):
    """A loss with a length of 0."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, F.one_hot(targets, 3).float())


def test_a_loss_that_is_an_empty_container_is_used() -> None:
    model = nn.Linear(4, 3)
    batches = [(torch.randn(8, 4), torch.arange(8) % 3)]
    own, plain = Taylor(model, batches, loss=EmptyLoss()), Taylor(model, batches)
    assert not torch.equal(own("weight", model.weight), plain("weight", model.weight))
