"""Adapters, averaged, compiled and quantized models: pruned right, or refused by name."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from drophot import Masks, magnitude_prune
from drophot.structured import Budget, plan_channels, prune_channels


class Adapted(nn.Module):
    """A layer with LoRA's two factors, named as PEFT names them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.lora_B["default"](self.lora_A["default"](x))
        return found + self.base_layer(x)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def adapted() -> nn.Sequential:
    model = network()
    model[2] = Adapted(model[2])  # pyright: ignore[reportArgumentType]
    return model


def test_adapters_are_refused_by_name_unless_they_are_skipped() -> None:
    model = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"`model`.*LoRA.*2\.lora_A\.default\.weight.*`skip`"):
        magnitude_prune(model, 0.5)
    with pytest.raises(ValueError, match=r"`model`.*LoRA.*2\.lora_A\.default\.weight.*`skip`"):
        prune_channels(model, 0.5, torch.ones(1, 6))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "the model is unchanged"
    masks = magnitude_prune(model, 0.5, skip=("2.lora_A", "2.lora_B"))
    assert set(masks) == {"0.weight", "2.base_layer.weight", "4.weight"}


def test_peft_is_refused_until_it_is_merged() -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(r=2, target_modules=["2"])
    model = peft.get_peft_model(network(), config)
    with pytest.raises(ValueError, match="LoRA.*lora_A.default.weight"):
        magnitude_prune(model, 0.5)
    merged = model.merge_and_unload()
    masks = magnitude_prune(merged, 0.5)
    assert set(masks) == {"0.weight", "2.weight", "4.weight"}


def test_an_average_that_starts_after_pruning_has_the_same_zeros() -> None:
    model = network()
    masks = magnitude_prune(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    with masks.hold(optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 6)).square().sum().backward()
            optimizer.step()
            average.update_parameters(model)
    held = Masks.from_zeros(average)
    for name, kept in masks.items():
        assert torch.equal(held[f"module.{name}"], kept)


@pytest.mark.parametrize("average", [False, True])
def test_an_averaged_or_compiled_model_is_pruned_as_the_plain_one(average: bool) -> None:
    plain, inner = network(), network()
    model = AveragedModel(inner) if average else torch.compile(inner, backend="eager")
    assert isinstance(model, nn.Module)
    x = torch.randn(4, 6)
    model(x)  # compiled for the old widths
    prune_channels(plain, 0.5, x)
    prune_channels(model, 0.5, x)
    assert [tuple(p.shape) for p in model.parameters()] == [
        tuple(p.shape) for p in plain.parameters()
    ]
    assert torch.allclose(model(x), plain(x), atol=1e-6)


def test_a_model_prepared_for_quantization_is_refused_by_name() -> None:
    from torch.ao.quantization import FakeQuantize

    model = network()
    model.insert(0, FakeQuantize())
    with pytest.raises(ValueError, match=r"`model`.*quantization.*0 \(FakeQuantize\)"):
        prune_channels(model, 0.5, torch.ones(1, 6))


class Packed(nn.Module):
    """A quantized layer as libraries write them: integers in a buffer, and a scale."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().max() / 127
        self.register_buffer("qweight", (layer.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.get_buffer("qweight") * self.get_buffer("scale")).T


def quantized_by_torch() -> nn.Sequential:
    if torch.backends.quantized.engine == "none":
        pytest.skip("torch without quantization")
    model = network()
    model[2] = torch.ao.quantization.quantize_dynamic(
        nn.Sequential(model[2]), {nn.Linear}
    )[0]  # fmt: skip
    return model


def packed() -> nn.Sequential:
    model, layer = network(), network()[2]
    assert isinstance(layer, nn.Linear)
    model[2] = Packed(layer)  # pyright: ignore[reportArgumentType]
    return model


@pytest.mark.filterwarnings("ignore")  # torch's own quantization is on its way out
@pytest.mark.parametrize("make", [packed, quantized_by_torch])
def test_quantized_layers_are_refused_by_name_unless_they_are_skipped(make: Any) -> None:
    model, x = make(), torch.randn(2, 6)
    before = model(x)
    kind = type(model[2]).__name__
    with pytest.raises(ValueError, match=rf"`model`.*quantized.*2 \({kind}\).*`skip`"):
        prune_channels(model, 0.5, x)
    with pytest.raises(ValueError, match=rf"`model`.*quantized.*2 \({kind}\).*`skip`"):
        plan_channels(model, example_inputs=x, to=Budget(parameters=60))
    assert torch.equal(model(x), before)
    model.insert(0, nn.Linear(6, 8))  # a layer that no quantized one reads
    model.insert(1, nn.Linear(8, 6))
    pruned = prune_channels(model, 0.5, x, skip=["4"])
    assert pruned.layers["0.weight"].after == 4
    assert pruned.layers["2.weight"].after == 8


class Recurrent(nn.Module):
    """A linear layer after a recurrent one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.layer = layer
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(self.first(x))[0]
        return self.last(found)


@pytest.mark.filterwarnings("ignore")  # torch's own quantization is on its way out
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.LSTMCell])
def test_quantized_recurrent_layers_are_refused_by_name(kind: type[nn.Module]) -> None:
    if torch.backends.quantized.engine == "none":
        pytest.skip("torch without quantization")
    model = torch.ao.quantization.quantize_dynamic(Recurrent(kind(8, 8)), {kind})
    x = torch.randn(3, 6)
    with pytest.raises(ValueError, match=rf"`model`.*quantized.*layer \({kind.__name__}\).*`skip`"):
        prune_channels(model, 0.5, x)
    with pytest.warns(UserWarning, match=rf"layer\.weight_ih.*{kind.__name__}, packed.*`skip`"):
        magnitude_prune(model, 0.5)


def test_integers_next_to_a_float_weight_are_not_a_quantized_layer() -> None:
    model = network()
    model[2].register_buffer("weight_mask", torch.ones(8, 8, dtype=torch.uint8))
    assert prune_channels(model, 0.5, torch.ones(1, 6)).layers["2.weight"].after == 4


def test_a_quantized_tensor_as_a_weight_is_refused_by_name() -> None:
    class Quantized(Tensor):
        """A subclass, as libraries for quantization make them."""

    model, layer = network(), network()[2]
    assert isinstance(layer, nn.Linear)
    model[2].register_parameter(
        "weight", nn.Parameter(layer.weight.detach().as_subclass(Quantized))
    )
    with pytest.raises(TypeError, match=r"`model`.*`2\.weight`.*Quantized"):
        prune_channels(model, 0.5, torch.ones(1, 6))


def test_zeros_and_widths_outlast_quantization() -> None:
    model = network()
    prune_channels(model, 0.5, torch.ones(1, 6))
    masks = magnitude_prune(model, 0.5)
    for name, kept in masks.items():
        weight = model.get_parameter(name)
        scale = weight.abs().max() / 127
        quantized = torch.fake_quantize_per_tensor_affine(weight, scale.item(), 0, -128, 127)
        assert not quantized[~kept].any()
