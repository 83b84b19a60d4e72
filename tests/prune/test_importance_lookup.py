"""Importances find their values by any name of a parameter, of a layer that can be ranked."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from drophot.prune import Importance, magnitude_prune
from drophot.prune.importances import BatchNormScale, Fisher, Random, Taylor, Wanda
from drophot.structured import prune_channels

INPUTS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.tensor([0, 1, 2, 0, 1, 2])
BATCHES = [(INPUTS[:2], TARGETS[:2]), (INPUTS[2:], TARGETS[2:])]


class Language(nn.Module):
    """An embedding whose weight is also that of the output layer, as in most language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(6, 8), nn.Linear(8, 8)
        self.output = nn.Linear(8, 6, bias=False)
        self.output.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.hidden(self.embed(tokens)).relu())[:, 0]


TOKENS = torch.tensor([[0, 3], [5, 1], [2, 4]])


def test_weights_that_an_embedding_shares_are_found_by_each_of_their_names() -> None:
    torch.manual_seed(0)
    model, batches = Language().double(), [(TOKENS, torch.tensor([1, 5, 0]))]
    F.cross_entropy(model(*batches[0][:1]), batches[0][1]).backward()
    weight = model.embed.weight
    assert weight.grad is not None
    gradient, values = weight.grad, weight.detach()
    norms = model.hidden(model.embed(TOKENS)).relu().detach().flatten(0, 1).norm(dim=0)
    expected = {
        Taylor(model, batches): (gradient * values) ** 2,
        Fisher(model, batches): (gradient * values) ** 2 / 2,
        Wanda(model, batches): values.abs() * norms,
    }
    for importance, of_weights in expected.items():
        for name in ("embed.weight", "output.weight"):
            found = importance(name, weight).double()
            torch.testing.assert_close(found, of_weights, rtol=1e-5, atol=0)
        masks = magnitude_prune(deepcopy(model), 0.5, importance=importance)
        assert set(masks) == {"hidden.weight", "output.weight"}
        pruned = prune_channels(deepcopy(model), 0.5, TOKENS, importance=importance)
        assert pruned.layers["hidden.weight"].after == 4


class Wrapped(nn.Module):
    """As `torch.compile` wraps a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model

    def forward(self, x: Tensor) -> Tensor:
        return self._orig_mod(x)


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    nn.init.normal_(model[1].weight)
    return model


BY_NAME: dict[str, Callable[[nn.Module], Importance]] = {
    "Taylor": lambda model: Taylor(model, BATCHES, channels=True),
    "Fisher": lambda model: Fisher(model, BATCHES),
    "Wanda": lambda model: Wanda(model, BATCHES),
    "BatchNormScale": lambda model: BatchNormScale(model, INPUTS),
    "Random": lambda model: Random(2),
}


@pytest.mark.parametrize("wrap", [Wrapped, AveragedModel, nn.DataParallel])
@pytest.mark.parametrize("name", BY_NAME)
def test_a_wrapped_model_is_ranked_as_the_model_in_it(name: str, wrap: Any) -> None:
    make = BY_NAME[name]
    expected = prune_channels(normed(), 0.5, INPUTS, importance=make(normed())).kept_channels
    for computed_from in (normed(), wrap(normed())):
        for model in (normed(), wrap(normed())):
            pruned = prune_channels(model, 0.5, INPUTS, importance=make(computed_from))
            (kept,) = (k for n, k in pruned.kept_channels.items() if n.endswith("0.weight"))
            assert torch.equal(kept, expected["0.weight"])
    if name == "BatchNormScale":
        best = normed()[1].weight.detach().abs().topk(4).indices.sort().values
        assert torch.equal(expected["0.weight"], best)


@pytest.mark.parametrize("name", ["Taylor", "Fisher", "BatchNormScale"])
def test_a_parameter_with_another_name_is_refused(name: str) -> None:
    inner = normed()
    model = nn.Sequential(inner, nn.Identity())  # its names start with 0
    with pytest.raises(ValueError, match=r"`importance`.*`0\.0\.weight`"):
        prune_channels(model, 0.5, INPUTS, importance=BY_NAME[name](inner))


@pytest.mark.parametrize("name", ["Fisher", "Wanda", "BatchNormScale"])
def test_an_importance_of_the_model_before_its_channels_were_removed(name: str) -> None:
    importance, model = BY_NAME[name](normed()), normed()
    prune_channels(model, 0.5, INPUTS, importance=importance)
    with pytest.raises(ValueError, match=r"`importance`.*`(0|3)\.weight`.*\((4, 5|3, 4)\) now"):
        prune_channels(model, 0.5, INPUTS, importance=importance)


def conv1d(inputs: int, outputs: int) -> nn.Module:
    """The Conv1D of Transformers: a Linear with a weight of shape (in, out)."""
    pytest.importorskip("transformers", reason="Transformers is not installed")
    from transformers.pytorch_utils import Conv1D

    return Conv1D(outputs, inputs)


def test_layers_whose_weight_has_its_inputs_first() -> None:
    model = nn.Sequential(conv1d(5, 4), nn.ReLU(), conv1d(4, 4), nn.Linear(4, 3)).double()
    weight = model.get_parameter("2.weight")
    hidden = model[0](INPUTS).relu().detach()
    wanda, taylor = Wanda(model, [INPUTS]), Taylor(model, [(INPUTS, TARGETS)], channels=True)
    expected = weight.detach().abs() * hidden.norm(dim=0)[:, None]
    torch.testing.assert_close(wanda("2.weight", weight).double(), expected, rtol=1e-5, atol=0)
    F.cross_entropy(model(INPUTS), TARGETS).backward()
    assert weight.grad is not None
    whole = (weight.grad * weight.detach()).sum(0) ** 2
    torch.testing.assert_close(taylor("2.weight", weight), whole)
    assert magnitude_prune(deepcopy(model), 0.5, importance=wanda).sparsity == 0.5
    kept = prune_channels(model, 0.5, INPUTS, importance=taylor).kept_channels
    assert torch.equal(kept["2.weight"], whole.topk(2).indices.sort().values)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hidden, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.hidden(x.mean(1)).relu())


def test_wanda_prunes_the_linear_layers_of_other_networks_if_the_rest_is_skipped() -> None:
    torch.manual_seed(0)
    model, x = Attending(), torch.randn(4, 5, 7)
    wanda, skip = Wanda(model, [x]), ["conv", "attention"]
    with pytest.raises(ValueError, match=r"`(conv|attention)\..*weight`.*`skip`"):
        prune_channels(deepcopy(model), 0.5, x, importance=wanda)
    assert set(magnitude_prune(deepcopy(model), 0.5, skip=skip, importance=wanda)) == {
        "hidden.weight", "head.weight"
    }  # fmt: skip
    pruned = prune_channels(model, 0.5, x, skip=skip, importance=wanda)
    assert pruned.layers["hidden.weight"].after == 3


def test_a_layer_whose_weight_is_computed_may_be_skipped() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.utils.parametrizations.weight_norm(model[2])
    masks = magnitude_prune(model, 0.5, skip=["2"], importance=Wanda(model, [torch.ones(4, 5)]))
    assert masks.sparsity == 0.5
