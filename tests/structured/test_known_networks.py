"""Networks of Transformers, torchvision and timm are pruned as asked, or the result says why."""

import copy
import re
from typing import Any

import pytest
import torch
from helpers.said import warned, zeros
from torch import nn

from drophot import Masks, magnitude_prune, summary
from drophot.prune import to_semi_structured
from drophot.structured import prune_channels


def test_the_conv1d_of_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(6, 8), nn.ReLU(), Conv1D(4, 6))  # (out, in)
    dense = copy.deepcopy(model)
    masks = magnitude_prune(model, 0.5, scope="layer")
    assert list(masks) == ["0.weight", "2.weight"]
    assert masks.sparsity == 0.5
    counted = summary(model, torch.ones(1, 8), batch_sizes=())
    assert counted.effective_flops == (counted.flops or 0) / 2
    assert magnitude_prune(copy.deepcopy(dense), 0.5, scope="erk").sparsity == pytest.approx(0.5)
    with pytest.warns(UserWarning, match=r"leaves.* dense.*: 2.weight \(6 inputs\)"):
        masks = magnitude_prune(dense, 0.5, pattern="2:4")
    assert (masks["0.weight"].view(2, 4, 6).sum(1) == 2).all()  # along the inputs, its first
    with pytest.raises((RuntimeError, ValueError), match="capability 8.0|Conv1D"):
        to_semi_structured(dense)


class Conv1D(nn.Module):
    """A class of the same name whose weight has another meaning."""

    def __init__(self) -> None:
        super().__init__()
        self.nf = 4
        self.weight = nn.Parameter(torch.randn(8, 4))


def test_a_conv1d_of_somebody_else_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Conv1D())
    assert "`1.weight` (Conv1D)" in warned(lambda: magnitude_prune(model, 0.5))[0]


def small(**settings: Any) -> dict[str, Any]:
    return {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        **settings,
    }


GPT = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16}
MOE = small(num_key_value_heads=2, num_experts_per_tok=2)

PRUNED = [
    ("GPT2LMHeadModel", "GPT2Config", GPT),
    ("GPT2Model", "GPT2Config", GPT),
    ("GPT2ForSequenceClassification", "GPT2Config", GPT),
    ("BertForMaskedLM", "BertConfig", small()),
    ("BertForSequenceClassification", "BertConfig", small()),
    ("ViTForImageClassification", "ViTConfig", small(image_size=32, patch_size=4)),
    ("LlamaForCausalLM", "LlamaConfig", small(num_key_value_heads=2)),
    (
        "SwinModel",
        "SwinConfig",
        {"image_size": 32, "embed_dim": 16, "depths": [2], "num_heads": [2]},
    ),
    (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 50, "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 16},
    ),
]


def made(model: str, config: str, settings: dict[str, Any]) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, model):
        pytest.skip(f"Transformers without {model}")
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**settings))


@pytest.mark.parametrize(("model", "config", "settings"), PRUNED)
def test_language_and_vision_models_are_pruned_as_asked(
    model: str, config: str, settings: dict[str, Any]
) -> None:
    network = made(model, config, settings)
    masks = magnitude_prune(network, 0.5)  # and nothing is said
    pruned = {id(network.get_parameter(name)) for name in masks}
    left = {n for n, p in network.named_parameters() if p.dim() > 1 and id(p) not in pruned}
    assert all(re.search("embed|wte|wpe|shared|bias|token", name) for name in left)
    assert masks.sparsity == pytest.approx(0.5, abs=1e-4)


MIXTURES = [
    ("MixtralForCausalLM", "MixtralConfig", MOE | {"num_local_experts": 4}),
    ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", MOE | {"num_experts": 4, "head_dim": 16}),
    ("GptOssForCausalLM", "GptOssConfig", MOE | {"num_local_experts": 4, "head_dim": 16}),
]


@pytest.mark.parametrize(("model", "config", "settings"), MIXTURES)
def test_mixtures_of_experts_are_pruned_or_named(
    model: str, config: str, settings: dict[str, Any]
) -> None:
    network = made(model, config, settings)
    said = warned(lambda: magnitude_prune(copy.deepcopy(network), 0.5))
    experts = [n for n, p in network.named_parameters() if p.dim() == 3]
    if experts:  # Transformers before 5 has a Linear for each
        assert f"`{experts[0]}`" in said[0]
        layers = 2
        magnitude_prune(network, 0.5, include=[f"model.layers.{i}" for i in range(layers)])
        assert zeros(network) == pytest.approx(0.5, abs=1e-3)
    else:
        assert not said


def test_an_embedding_that_is_the_head_is_pruned_with_it() -> None:
    network = made("GPT2LMHeadModel", "GPT2Config", GPT)
    assert "lm_head.weight" in magnitude_prune(copy.deepcopy(network), 0.5)
    dense = copy.deepcopy(network)
    assert "lm_head.weight" not in magnitude_prune(dense, 0.5, skip=("transformer.wte",))
    assert (dense.get_parameter("transformer.wte.weight") != 0).all()


TORCHVISION = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mvit_v2_s",
    "resnet18",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "swin3d_t",
    "vgg11",
    "vit_b_32",
    "r3d_18",
    "deeplabv3_resnet50",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "raft_small",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
@pytest.mark.filterwarnings("ignore:The default weight initialization of")
def test_nothing_is_said_of_torchvisions_networks(name: str) -> None:
    models = pytest.importorskip("torchvision").models
    backbone = (
        {}
        if name not in ("deeplabv3_resnet50", "fasterrcnn_mobilenet_v3_large_fpn")
        else {"weights_backbone": None}
    )
    with torch.device("meta"):  # which skips the initialisation
        network = models.get_model(name, weights=None, **backbone)
    masks = Masks.from_zeros(network.to_empty(device="cpu"))
    assert len(masks) > 4


TIMM = [
    "beit_base_patch16_224",
    "convnext_atto",
    "tf_efficientnet_b0",
    "mobilenetv3_small_050",
    "ghostnet_050",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "mixer_s32_224",
    "coatnet_nano_rw_224",
    "levit_128s",
    "resnet18",
    "regnetx_002",
    "deit_tiny_distilled_patch16_224",
    "nest_tiny",
    "qwen3_vit_88m",
]


@pytest.mark.parametrize("name", TIMM)
def test_nothing_is_said_of_timms_networks(name: str) -> None:
    timm = pytest.importorskip("timm")
    if name not in timm.list_models():
        pytest.skip(f"timm without {name}")
    with torch.device("meta"):
        network = timm.create_model(name)
    masks = Masks.from_zeros(network.to_empty(device="cpu"))
    assert len(masks) > 4


def test_standardised_weights_of_timm_are_named() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        network = timm.create_model("resnetv2_50x1_bit")
    network = network.to_empty(device="cpu")
    (message,) = warned(lambda: Masks.from_zeros(network))
    assert message.startswith("92.0% of")
    assert "`stem.conv.weight` (StdConv2d, " in message
    assert len(Masks.from_zeros(network, include=("stem", "stages"))) == 54


def test_channels_of_layers_that_are_no_longer_refused() -> None:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(8, 4), nn.ReLU(), Conv1D(2, 8))  # (out, in)
    pruned = prune_channels(model, 0.5, torch.randn(2, 4))
    assert model(torch.randn(3, 4)).shape == (3, 2)
    assert pruned.parameters.removed > 0.3
