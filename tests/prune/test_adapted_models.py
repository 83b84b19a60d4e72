"""Adapters, averaged, compiled and quantized models: pruned right, or refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from drophot import Masks, magnitude_prune
from drophot.prune import Schedule
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


class Scaled(nn.Module):
    """A layer with an adapter of another kind, as PEFT writes all of them."""

    adapter_layer_names = ("scale",)
    merged_adapters: tuple[str, ...] = ()

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.scale = nn.ParameterDict({"default": nn.Parameter(torch.ones(8))})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) * self.scale["default"]


class LoraLinear(nn.Linear):
    """LoRA as loralib writes it, with parameters in the layer itself."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.lora_A = nn.Parameter(torch.randn(2, base.in_features))
        self.lora_B = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return nn.functional.linear(x, self.weight, self.bias) + x @ self.lora_A.T @ self.lora_B.T


OWN_ADAPTERS: dict[str, tuple[Any, str, list[str]]] = {
    "of any method": (Scaled, "2.base_layer.weight", ["2.scale"]),
    "in the layer": (LoraLinear, "2.weight", ["2.lora_A", "2.lora_B"]),
}


def prunings(model: nn.Module, x: Tensor) -> list[Callable[[], object]]:
    return [
        lambda: magnitude_prune(model, 0.5),
        lambda: Schedule(model, [0.5], every=1),
        lambda: prune_channels(model, 0.5, x),
        lambda: plan_channels(model, example_inputs=x, to=Budget(parameters=60)),
    ]


@pytest.mark.filterwarnings("ignore:.*stay dense")
@pytest.mark.parametrize("kind", OWN_ADAPTERS)
def test_adapters_of_other_methods_are_refused_too(kind: str) -> None:
    make, base, skip = OWN_ADAPTERS[kind]
    model, x = network(), torch.ones(1, 6)
    model[2] = make(model[2])
    for prune in prunings(model, x):
        with pytest.raises(ValueError, match=rf"`model`.*{skip[0]}.*`skip`"):
            prune()
    for left, names in ((skip, {base}), (["2"], set[str]())):  # the adapter alone, or the layer
        plan_channels(model, 0.0, x, skip=left)
        assert set(magnitude_prune(model, 0.5, skip=left)) == names | {"0.weight", "4.weight"}


METHODS: dict[str, dict[str, Any]] = {
    "AdaLoraConfig": {"init_r": 4, "target_r": 2, "total_step": 10},
    "LoHaConfig": {"r": 2},
    "LoKrConfig": {"r": 2},
    "OFTConfig": {"r": 0, "oft_block_size": 4},
    "VeraConfig": {"r": 2},
    "FourierFTConfig": {"n_frequency": 10},
    "HRAConfig": {"r": 2},
    "IA3Config": {"feedforward_modules": []},
    "VBLoRAConfig": {"r": 2, "num_vectors": 8, "vector_length": 2, "topk": 2},
    "LNTuningConfig": {},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_peft_is_refused_until_it_is_merged(method: str) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = getattr(peft, method)(target_modules=["2"], **METHODS[method])
    model = peft.get_peft_model(network(), config).eval()
    for prune in prunings(model, torch.ones(1, 6)):
        with pytest.raises(ValueError, match=r"`model`.*adapters.*base_model\.model\.2\.\w+"):
            prune()
    merged = model.merge_and_unload()
    assert set(magnitude_prune(merged, 0.5)) == {"0.weight", "2.weight", "4.weight"}


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


@pytest.mark.parametrize("how", ["new", "called", "in place"])
def test_a_model_compiled_with_fullgraph_is_pruned(how: str) -> None:
    inner, x = network(), torch.randn(4, 6)
    expected = prune_channels(network(), 0.5, x)
    model = inner if how == "in place" else torch.compile(inner, backend="eager", fullgraph=True)
    if how == "in place":
        inner.compile(backend="eager", fullgraph=True)
    if how != "new":
        model(x)
    pruned = prune_channels(model, 0.5, x)
    assert pruned.parameters == expected.parameters
    assert torch.equal(model(x), nn.Sequential(*inner)(x))
    torch.compiler.reset()


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Linear(6, 8), nn.ReLU()))


def programs() -> dict[str, tuple[Any, str]]:
    """By kind: a function that makes one, and what the error calls it."""
    x = torch.ones(2, 6)
    return {
        "script": (scripted, "`model`.*TorchScript"),
        "trace": (lambda: torch.jit.trace(network(), x), "`model`.*TorchScript"),
        "export": (
            lambda: torch.export.export(network(), (x,)).module(),
            r"`model`.*torch\.export",
        ),
        "unflattened": (
            lambda: torch.export.unflatten(torch.export.export(network(), (x,))),
            r"`model`.*torch\.export",
        ),
        "inside": (
            lambda: nn.Sequential(scripted(), nn.Linear(8, 3)),
            "`0` in `model`.*TorchScript",
        ),
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("kind", list(programs()))
def test_programs_are_refused_by_name(kind: str) -> None:
    make, match = programs()[kind]
    model, x = make(), torch.ones(2, 6)
    for function in (prune_channels, plan_channels):
        with pytest.raises(ValueError, match=match):
            function(model, 0.5, x)
    if kind != "inside":
        with pytest.raises(ValueError, match=match):
            magnitude_prune(model, 0.5)


def test_an_exported_program_is_refused_by_name() -> None:
    program = torch.export.export(network(), (torch.ones(2, 6),))
    for function in (prune_channels, magnitude_prune):
        with pytest.raises(TypeError, match=r"`model`.*ExportedProgram.*export"):
            function(program, 0.5)


def test_a_model_with_only_quantized_layers_is_refused_by_name() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.ones(4, 4, dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.get_buffer("weight").float()

    model = nn.Sequential(Packed(), nn.ReLU(), Packed())
    for function in (prune_channels, magnitude_prune):
        with pytest.raises(ValueError, match=r"`model`.*quantized.*0 \(Packed\), 2 \(Packed\)"):
            function(model, 0.5)


def test_one_plan_keeps_a_model_and_its_average_alike() -> None:
    model, x = network(), torch.randn(4, 6)
    average = AveragedModel(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    plan = plan_channels(model, 0.5, x)
    kept = plan.apply(model, x).kept_channels["0.weight"]
    assert torch.equal(plan.apply(average, x).kept_channels["module.0.weight"], kept)
    average.update_parameters(model)


def test_a_reference_quantized_layer_does_not_stop_pruning() -> None:
    from torch.ao.nn.quantized import reference

    model = nn.Sequential(reference.Linear(5, 8), nn.Linear(8, 3))
    assert magnitude_prune(model, 0.5, skip=["0"]).sparsity == 0.5


def test_all_plain_layers_in_skip_is_said_even_if_others_are_quantized() -> None:
    with pytest.raises(ValueError, match="`skip`"):
        magnitude_prune(packed(), 0.5, skip=[name for name, _ in packed().named_children()])
