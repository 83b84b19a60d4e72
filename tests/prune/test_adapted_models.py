"""Adapters, averaged, compiled and quantized models: pruned right, or refused by name."""

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from drophot import Masks, magnitude_prune
from drophot.structured import prune_channels


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


def test_zeros_and_widths_outlast_quantization() -> None:
    model = network()
    prune_channels(model, 0.5, torch.ones(1, 6))
    masks = magnitude_prune(model, 0.5)
    for name, kept in masks.items():
        weight = model.get_parameter(name)
        scale = weight.abs().max() / 127
        quantized = torch.fake_quantize_per_tensor_affine(weight, scale.item(), 0, -128, 127)
        assert not quantized[~kept].any()
