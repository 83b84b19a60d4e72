"""Structured pruning compared with networks built smaller by hand and with zeroed channels."""

import json
import warnings
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pytest
import torch
from helpers.channels import assert_same_numbers, distinct
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from drophot import summary
from drophot.models import fcnet, lenet
from drophot.structured import Change, Pruned, prune_channels, pruning_run, rebuild

models = pytest.importorskip("torchvision.models", reason="the extra `vision` is not installed")
from torchvision.models import VisionTransformer  # noqa: E402 - only where it is there
from torchvision.models.convnext import CNBlockConfig  # noqa: E402
from torchvision.models.efficientnet import EfficientNet, MBConvConfig  # noqa: E402
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3  # noqa: E402
from torchvision.models.regnet import BlockParams, RegNet  # noqa: E402
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet  # noqa: E402

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
DIGITS = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def tiny_vit(**_: int) -> nn.Module:
    model = VisionTransformer(32, 8, num_layers=2, num_heads=3, hidden_dim=48, mlp_dim=96)
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it at zero
    return model


def vgg11_bn() -> nn.Module:
    """Torchvision's with a quarter of the channels, and a narrower classifier."""
    with torch.device("meta"):
        model = models.VGG(nn.Identity(), init_weights=False)
    sizes = [size if size == "M" else size // 4 for size in models.vgg.cfgs["A"]]
    model.features = models.vgg.make_layers(sizes, batch_norm=True)
    model.classifier = nn.Sequential(
        *(nn.Linear(128 * 7 * 7, 64), nn.ReLU(), nn.Dropout()),
        *(nn.Linear(64, 48), nn.ReLU(), nn.Dropout(), nn.Linear(48, 10)),
    )
    return model


def efficientnet() -> nn.Module:
    """The first three stages of torchvision's `efficientnet_b0`."""
    stages = [(1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2)]
    return EfficientNet([MBConvConfig(*stage) for stage in stages], 0.2, num_classes=10)


def mobilenet_v3() -> nn.Module:
    """The first five blocks of torchvision's `mobilenet_v3_small`."""
    blocks = [
        (16, 3, 16, 16, True, "RE", 2, 1, 1.0),
        (16, 3, 72, 24, False, "RE", 2, 1, 1.0),
        (24, 3, 88, 24, False, "RE", 1, 1, 1.0),
        (24, 5, 96, 40, True, "HS", 2, 1, 1.0),
        (40, 5, 240, 40, True, "HS", 1, 1, 1.0),
    ]
    return MobileNetV3([InvertedResidualConfig(*block) for block in blocks], 256, num_classes=10)


def regnet() -> nn.Module:
    """Torchvision's in three stages."""
    depths, widths = [1, 2, 2], [32, 64, 128]
    blocks = BlockParams(depths, widths, [8] * 3, [1.0] * 3, [2] * 3, se_ratio=0.25)
    return RegNet(blocks, num_classes=10)


class Block(nn.Module):
    """A residual connection, a concatenation, a grouped and a depthwise convolution."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.left = nn.Conv2d(12, 8, 1)
        self.right = nn.Conv2d(12, 16, 3, padding=1, groups=groups)
        self.depth = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.back = nn.Conv2d(24, 12, 1)
        self.up = nn.ConvTranspose2d(12, 10, 2, stride=2)
        self.head = nn.Linear(10 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = self.depth(torch.cat([self.left(x), self.right(x)], 1)).relu()
        x = F.max_pool2d(x + self.back(y), 4)
        return self.head(F.adaptive_avg_pool2d(self.up(x), 2).flatten(1))


class Attention(nn.Module):
    """Attention written by hand, with an inner width that differs from the stream's."""

    def __init__(self, width: int = 12, heads: int = 2, inner: int = 16) -> None:
        super().__init__()
        self.heads = heads
        self.head_width = inner // heads
        self.embed = nn.Linear(3, width)
        self.qkv = nn.Linear(width, 3 * inner)
        self.out = nn.Linear(inner, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2)).relu()
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, self.head_width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return self.head(x.mean(1))


class Shuffle(nn.Module):
    """Two branches whose channels are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.branch = nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, 1)
        x = torch.cat([left, self.branch(right)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(x).mean((2, 3))


CONVOLUTIONAL = {
    "lenet": (lenet, DIGITS),
    "fcnet": (partial(fcnet, hidden=32), DIGITS),
    "block": (Block, IMAGES),
    "groups": (partial(Block, groups=4), IMAGES),
    "attention": (Attention, IMAGES),
    "shuffle": (Shuffle, IMAGES),
    "resnet": (partial(ResNet, BasicBlock, [2, 2, 1, 1]), IMAGES),
    "bottlenecks": (partial(ResNet, Bottleneck, [1, 2, 1, 1], width_per_group=16), IMAGES),
    "resnext": (partial(ResNet, Bottleneck, [1, 2, 1, 1], groups=8, width_per_group=4), IMAGES),
    "mobilenet_v3": (mobilenet_v3, IMAGES),
    "vgg11_bn": (vgg11_bn, IMAGES),
    "densenet": (partial(models.DenseNet, 8, (2, 3, 2, 2), 16), IMAGES),
    "efficientnet": (efficientnet, IMAGES),
    "squeezenet": (models.squeezenet1_1, IMAGES),
    "regnet": (regnet, IMAGES),
    "shufflenet": (
        partial(models.ShuffleNetV2, [2, 3, 2], [24, 48, 96, 192, 256], num_classes=10),
        IMAGES,
    ),
}
NORMALISED = {  # over the channels, so that a channel that is gone differs from one of zeros
    "vit": (tiny_vit, IMAGES),
    "convnext": (
        lambda: models.ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 2)]),
        IMAGES,
    ),
    "swin": (
        partial(models.SwinTransformer, [4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5),
        IMAGES,
    ),
}
ALL = CONVOLUTIONAL | NORMALISED


@pytest.mark.parametrize("name", ["block", "groups", "fcnet", "lenet", "vit"])
@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_a_channel_that_is_gone_is_one_of_zeros(name: str, ratio: float) -> None:
    factory, inputs = ALL[name]
    torch.manual_seed(0)
    model, inputs = distinct(factory()), inputs.double()
    dense = deepcopy(model)
    prune_channels(model, ratio, inputs)
    other = torch.cat([inputs, inputs[:1]]) + 0.1
    assert_same_numbers(dense, model, inputs, other)


@dataclass(frozen=True, slots=True, kw_only=True)
class Halved:
    """A network before and after half of its channels are removed, in float64."""

    name: str
    inputs: Tensor
    dense: nn.Module
    model: nn.Module
    pruned: Pruned


@pytest.fixture(scope="module", params=ALL)
def halved(request: pytest.FixtureRequest) -> Halved:
    factory, inputs = ALL[request.param]
    torch.manual_seed(0)
    dense, inputs = distinct(factory()), inputs.double()
    model = deepcopy(dense)
    pruned = prune_channels(model, 0.5, inputs)
    return Halved(name=request.param, inputs=inputs, dense=dense, model=model, pruned=pruned)


@pytest.mark.slow
def test_half_of_the_channels_are_as_zeros(halved: Halved) -> None:
    other = torch.cat([halved.inputs, halved.inputs[:1]]) + 0.1
    assert_same_numbers(halved.dense, deepcopy(halved.model).eval(), halved.inputs, other)


@pytest.mark.slow
def test_about_the_share_that_was_asked_for_goes(halved: Halved) -> None:
    model, pruned = halved.model, halved.pruned
    before = sum(p.numel() for p in halved.dense.parameters())
    after = sum(p.numel() for p in model.parameters())
    assert pruned.parameters == Change(before, after)
    assert pruned.bytes == Change(8 * before, 8 * after)
    # The rest is the classifier's outputs, which stay. Shuffled channels are tied to each other.
    classes = model(halved.inputs).shape[1]
    most = 0.5 * (1 - classes / pruned.channels.before)
    assert pruned.channels.removed <= 0.5
    assert pruned.channels.removed > most - (0.1 if halved.name == "shufflenet" else 0.02)
    for layer, change in pruned.layers.items():
        shape = model.get_parameter(layer).shape
        assert change.after in shape[:2]
        assert len(pruned.kept_channels[layer]) == change.after
        assert (change.after < change.before) == (layer not in pruned.unpruned_layers)


@pytest.mark.slow
def test_what_is_left_is_a_plain_module_that_trains_on(halved: Halved) -> None:
    model, inputs = deepcopy(halved.model), halved.inputs
    assert list(halved.model.state_dict()) == list(halved.dense.state_dict())
    assert type(halved.model) is type(halved.dense)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in halved.model.modules())
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1.0)
    F.cross_entropy(model(torch.cat([inputs] * 2)), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert sum(moved) > 0.8 * len(moved)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
def test_it_is_rebuilt_from_its_description(halved: Halved) -> None:
    model, inputs, pruned = deepcopy(halved.model).eval(), halved.inputs, halved.pruned
    description = json.loads(json.dumps(pruned.description))
    other = rebuild(ALL[halved.name][0]().double(), description)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(inputs), model(inputs))
    assert repr(other) == repr(model)
    again = rebuild(deepcopy(halved.dense), pruned.description)
    assert again.load_state_dict(model.state_dict())


def lenet_by_hand(model: nn.Module, kept: dict[str, Tensor]) -> nn.Module:
    """A LeNet with narrower layers, its weights copied channel by channel."""
    small = lenet()
    widths = {name: len(index) for name, index in kept.items()}
    small.conv1 = nn.Conv2d(1, widths["conv1"], 5)
    small.conv2 = nn.Conv2d(widths["conv1"], widths["conv2"], 5)
    small.fc1 = nn.Linear(16 * widths["conv2"], widths["fc1"])
    small.fc2 = nn.Linear(widths["fc1"], widths["fc2"])
    small.fc3 = nn.Linear(widths["fc2"], 10)
    names = ["conv1", "conv2", "fc1", "fc2", "fc3"]
    columns: list[list[int]] = [[0]]
    for before, after in pairwise(names):
        rows = kept[before].tolist()
        if after == "fc1":
            rows = [16 * channel + place for channel in rows for place in range(16)]
        columns.append(rows)
    for name, column in zip(names, columns, strict=True):
        old, new = model.get_submodule(name), small.get_submodule(name)
        for row, source in enumerate(kept[name].tolist()):
            new.bias.data[row] = old.bias.data[source]
            for place, other in enumerate(column):
                new.weight.data[row, place] = old.weight.data[source, other]
    return small


def least_by_hand(model: nn.Module, name: str, after: str, places: int, remove: int) -> set[int]:
    """The channels of a layer with the least squared weights, in it and in the next layer."""
    made = model.get_submodule(name).weight.detach()
    taken = model.get_submodule(after).weight.detach()
    one, other = [], []
    for channel in range(len(made)):
        one.append(float((made[channel] ** 2).sum()))
        columns = [channel * places + place for place in range(places)]
        other.append(sum(float((taken[:, column] ** 2).sum()) for column in columns))
    mean, mean_other = sum(one) / len(one), sum(other) / len(other)
    scores = [a / mean + b / mean_other for a, b in zip(one, other, strict=True)]
    return set(sorted(range(len(made)), key=lambda channel: scores[channel])[:remove])


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.83])
def test_lenet_against_one_that_is_built_smaller_by_hand(ratio: float) -> None:
    torch.manual_seed(1)
    model = lenet()
    old = deepcopy(model)
    pruned = prune_channels(model, ratio, DIGITS)
    kept = {name.removesuffix(".weight"): index for name, index in pruned.kept_channels.items()}
    for name, after, places in (
        ("conv1", "conv2", 1),
        ("conv2", "fc1", 16),
        ("fc1", "fc2", 1),
        ("fc2", "fc3", 1),
    ):
        size = pruned.layers[f"{name}.weight"].before
        least = least_by_hand(old, name, after, places, int(ratio * size + 0.5))
        assert set(range(size)) - set(kept[name].tolist()) == least
    by_hand = lenet_by_hand(old, kept)
    for (name, tensor), (other, same) in zip(
        model.state_dict().items(), by_hand.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(tensor, same)
    torch.testing.assert_close(model(DIGITS), by_hand(DIGITS))
    assert pruned.unpruned_layers == {"fc3.weight": "an output of the network"}


@pytest.mark.slow
@given(
    ratio=st.floats(0, 0.99),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    seed=st.integers(0, 100),
)
def test_exactly_the_share_goes_and_one_stays(ratio: float, widths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    sizes = [4, *widths, 3]
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    model = nn.Sequential(*layers)
    remove = [min(int(ratio * width + 0.5), width - 1) for width in widths]
    if ratio and not any(remove):
        state = deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"`ratio`.* removes none"):
            prune_channels(model, ratio, torch.ones(1, 4))
        assert all(torch.equal(a, state[name]) for name, a in model.state_dict().items())
        return
    prune_channels(model, ratio, torch.ones(1, 4))
    left = [width - gone for width, gone in zip(widths, remove, strict=True)]
    assert [m.out_features for m in layers] == [*left, 3]
    assert [m.in_features for m in layers] == [4, *left]
    assert [tuple(m.weight.shape) for m in layers] == list(zip([*left, 3], [4, *left], strict=True))
    assert model(torch.ones(2, 4)).shape == (2, 3)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_the_scale_of_a_layer_does_not_matter(scale: float) -> None:
    torch.manual_seed(0)
    model = lenet()
    other = deepcopy(model)
    other.conv2.weight.data.mul_(scale)
    kept, same = (prune_channels(m, 0.5, DIGITS).kept_channels for m in (model, other))
    assert all(torch.equal(index, same[name]) for name, index in kept.items())


@pytest.mark.slow
def test_coupled_layers_lose_the_same_channels_and_count_alike() -> None:
    torch.manual_seed(0)
    model = models.resnet18()
    pruned = prune_channels(model, 0.5, IMAGES)
    stream = ["layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2"]
    first, *others = (pruned.kept_channels[f"{name}.weight"] for name in stream)
    assert all(torch.equal(first, other) for other in others)
    # One of them alone does not decide: in the sum of shares each has the same weight.
    torch.manual_seed(0)
    loud = models.resnet18()
    loud.get_parameter(f"{stream[0]}.weight").data.mul_(1000)
    assert torch.equal(
        prune_channels(loud, 0.5, IMAGES).kept_channels[f"{stream[0]}.weight"], first
    )


def test_heads_lose_equally_many_and_queries_the_same_as_keys() -> None:
    torch.manual_seed(0)
    model = Attention()
    kept = prune_channels(model, 0.5, IMAGES).kept_channels["qkv.weight"]
    q, k, v = (kept[(kept >= 16 * i) & (kept < 16 * i + 16)] - 16 * i for i in range(3))
    assert torch.equal(q, k)
    for part in (q, v):
        assert ((part < 8).sum(), (part >= 8).sum()) == (4, 4)
    assert (model.head_width, model.heads) == (4, 2)  # the width that its code reads
    assert not torch.equal(q, v)


def test_heads_go_as_a_whole_where_the_scale_follows_from_their_width() -> None:
    """Of 3 heads and a width of 48, a ratio of 0.4 removes one head and 16 channels."""
    model = tiny_vit()
    pruned = prune_channels(model, 0.4, IMAGES)
    attention = model.encoder.layers[0].self_attention
    assert (attention.embed_dim, attention.num_heads, attention.head_dim) == (32, 2, 16)
    assert attention.in_proj_weight.shape == (96, 32)
    assert model.hidden_dim == 32
    assert list(pruned.unpruned_layers) == ["heads.head.weight"]


@pytest.mark.parametrize(("groups", "left"), [(2, 2), (4, 4), (8, 4), (24, 12)])
def test_groups_get_narrower_or_fewer(groups: int, left: int) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, groups=groups), nn.Conv2d(24, 5, 1)
    model = nn.Sequential(*layers)
    pruned = prune_channels(model, 0.5, IMAGES)
    grouped = layers[1]
    assert grouped.groups == left
    assert (grouped.in_channels, grouped.out_channels) == (12, 12)
    assert grouped.weight.shape == (12, 12 // left, 3, 3)
    kept = pruned.kept_channels["1.weight"] // (24 // groups)
    assert torch.equal(kept.unique(return_counts=True)[1], torch.full((left,), 12 // left))


def test_parts_of_equal_size_lose_equally_many() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            one, other = self.a(x).chunk(2, 1)
            return self.b(torch.cat([other, one], 1))

    model = Halves()
    # A ranking of all sixteen would take the first half away.
    model.a.weight.data[:8].mul_(1e-3)
    model.b.weight.data[:, 8:].mul_(1e-3)
    pruned = prune_channels(model, 0.5, torch.ones(2, 3))
    assert pruned.layers["a.weight"] == (16, 8)
    assert (pruned.kept_channels["a.weight"] < 8).sum() == 4


def test_what_is_put_beside_the_input_keeps_the_inputs_place() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(3, 11), nn.Linear(11, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([x, self.a(x)], 1) + self.b(x))

    model = Beside()
    pruned = prune_channels(model, 0.5, torch.ones(2, 3))
    assert pruned.layers == {"a.weight": (8, 4), "b.weight": (11, 7), "c.weight": (2, 2)}
    assert pruned.kept_channels["b.weight"][:3].tolist() == [0, 1, 2]
    assert torch.equal(pruned.kept_channels["b.weight"][3:] - 3, pruned.kept_channels["a.weight"])


def test_shared_weights_stay_shared() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(4, 8), layer, nn.ReLU(), layer, nn.Linear(8, 2))
    tied = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    tied[1].bias = tied[0].bias
    prune_channels(model, 0.5, torch.ones(1, 4))
    assert model[1] is model[3]
    assert model[1].weight.shape == (4, 4)
    prune_channels(tied, 0.5, torch.ones(1, 4))
    assert tied[0].bias is tied[1].bias
    assert tied[0].bias.shape == (4,)
    assert tied(torch.ones(3, 4)).shape == (3, 2)


def test_a_weight_of_an_embedding_and_a_linear_layer_keeps_both_modules_numbers_right() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix = nn.Embedding(12, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 12, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.mix(self.embed(tokens)).relu())

    model = Tied()
    prune_channels(model, 0.5, torch.arange(12))
    assert model.head.weight is model.embed.weight
    assert model.head.weight.shape == (12, 4)
    assert (model.embed.embedding_dim, model.mix.in_features, model.head.in_features) == (4, 4, 4)


def test_what_is_skipped_keeps_its_shape() -> None:
    model = models.resnet18()
    shapes = {name: tensor.shape for name, tensor in model.layer3.state_dict().items()}
    pruned = prune_channels(model, 0.5, IMAGES, skip=["layer3"])
    assert {name: tensor.shape for name, tensor in model.layer3.state_dict().items()} == shapes
    assert model.layer2[0].conv1.out_channels == 64
    assert model.layer2[1].conv2.out_channels == 128  # what layer3 is given
    assert pruned.unpruned_layers["layer3.0.conv1.weight"].startswith("`skip` names layer3")
    with pytest.raises(ValueError, match="layer9"):
        prune_channels(model, 0.5, IMAGES, skip=["layer9"])


def test_memory_formats_modes_and_gradients_stay() -> None:
    model = models.resnet18().to(memory_format=torch.channels_last)
    model.layer1.eval()
    model.conv1.weight.requires_grad_(False)
    prune_channels(model, 0.5, IMAGES)
    assert model.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.training
    assert not model.layer1[0].bn1.training
    assert not model.conv1.weight.requires_grad
    assert model.fc.weight.requires_grad


def test_inputs_in_a_tuple_or_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(5, 8), nn.Linear(8, 2)

        def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
            return {"logits": self.c(self.a(first) * self.b(second))}

    inputs = torch.ones(2, 3), torch.ones(2, 5)
    for given_as in (inputs, dict(zip(("first", "second"), inputs, strict=True))):
        model = Two()
        assert prune_channels(model, 0.5, given_as).layers["a.weight"] == (8, 4)
        assert model(*inputs)["logits"].shape == (2, 2)


def test_a_data_parallel_network_is_pruned_as_the_network_in_it() -> None:
    inner, plain = lenet(), lenet()
    pruned = prune_channels(nn.DataParallel(inner), 0.5, DIGITS)
    assert pruned.parameters == prune_channels(plain, 0.5, DIGITS).parameters
    assert inner.conv1.out_channels == 3


def test_an_unknown_operator_keeps_its_channels() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).sort().values))

    model = Sorted()
    pruned = prune_channels(model, 0.5, torch.ones(2, 3))
    assert pruned.layers == {"a.weight": (8, 8), "b.weight": (8, 4), "c.weight": (2, 2)}
    assert "sort" in pruned.unpruned_layers["a.weight"]


def test_a_width_that_the_code_knows_by_heart_stays() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).view(-1, 8)))

    model = Fixed()
    pruned = prune_channels(model, 0.5, torch.ones(2, 3))
    assert pruned.layers == {"a.weight": (8, 8), "b.weight": (6, 3), "c.weight": (2, 2)}
    assert "a reshape" in pruned.unpruned_layers["a.weight"]


def test_the_result_says_it() -> None:
    pruned = prune_channels(lenet(), 0.5, DIGITS)
    lines = str(pruned).splitlines()
    assert lines[0] == "requested: remove 50.0% of the channels"
    assert lines[1].split() == ["channels", "236", "to", "123", "47.9%", "removed"]
    assert lines[2].split() == ["parameters", "44,426", "to", "11,418", "74.3%", "removed"]
    assert lines[5:] == [
        "not removed: 5 of 118 requested channels:",
        "         5  an output of the network",
    ]
    assert pruned.parameters.removed == 1 - 11_418 / 44_426


def test_a_ratio_of_nothing_changes_nothing() -> None:
    model = lenet()
    state = deepcopy(model.state_dict())
    pruned = prune_channels(model, 0, DIGITS)
    assert pruned.channels.removed == 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


class Capricious(nn.Module):
    """A network that calls other operators each time."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        Capricious.calls += 1
        x = self.a(x)
        for _ in range(Capricious.calls):
            x = x.relu()
        return self.b(x)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aux = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))


def parametrised() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.Linear(8, 2))


def infinite() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    model[0].weight.data[0, 0] = float("inf")
    return model


@pytest.mark.parametrize(
    ("factory", "settings", "error", "message"),
    [
        (lenet, {"ratio": 1.0}, ValueError, r"`ratio`.*1\.0"),
        (lenet, {"ratio": "half"}, TypeError, "`ratio`.*half"),
        (lenet, {"inputs": torch.ones(1, 3)}, ValueError, "`example_inputs`"),
        (lenet, {"skip": "conv1"}, TypeError, "`skip`.*conv1"),
        (lazy, {}, ValueError, "`0.weight`"),
        (parametrised, {}, ValueError, "`0.weight`.*parametrization"),
        (infinite, {}, ValueError, "`0.weight`"),
        (partial(nn.Linear, 4, 2), {}, ValueError, r"0\.5 removes none .weight: an output"),
        (nn.ReLU, {}, ValueError, "ReLU"),
    ],
)
def test_what_cannot_be_pruned_is_refused_and_left_as_it_was(
    factory, settings: dict, error: type[Exception], message: str
) -> None:
    model = factory()
    inputs = settings.get("inputs", DIGITS if factory is lenet else torch.ones(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lazy modules
        state = dict(model.state_dict())
    shape = repr(model)
    with pytest.raises(error, match=message):
        prune_channels(model, settings.get("ratio", 0.5), inputs, skip=settings.get("skip", ()))
    assert repr(model) == shape
    if factory is not lazy:
        assert all(a.data_ptr() == state[name].data_ptr() for name, a in model.state_dict().items())


@pytest.mark.parametrize("skip", [(), ("aux",)])
def test_an_unused_part_stays_and_is_named(skip: tuple[str, ...]) -> None:
    model = Unused()
    pruned = prune_channels(model, 0.5, torch.ones(2, 4), skip=skip)
    assert pruned.layers["a.weight"] == (8, 4)
    assert model.aux.weight.shape == (2, 8)
    assert "aux.weight" in pruned.unpruned_layers


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failure_half_way_leaves_the_model_as_it_was(at: int) -> None:
    model = tiny_vit()
    state, attributes = (
        dict(model.state_dict()),
        {n: dict(vars(m)) for n, m in model.named_modules()},
    )
    calls = 0

    def breaks(*_: object) -> None:
        """Raise an error in one of the passes in which the first layer is already smaller."""
        nonlocal calls
        calls += model.conv_proj.weight.shape != state["conv_proj.weight"].shape
        if calls == at:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(breaks)
    with pytest.raises(KeyboardInterrupt):
        prune_channels(model, 0.3, IMAGES)
    handle.remove()
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == state[name].data_ptr()
    for name, module in model.named_modules():
        for attribute, value in attributes[name].items():
            if isinstance(value, (int, tuple)):
                assert getattr(module, attribute) == value


def test_a_failure_after_the_last_check_leaves_it_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = lenet(), 0
    state = dict(model.state_dict())

    def fails(*arguments: object, **settings: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError
        return summary(*arguments, **settings)

    monkeypatch.setattr(pruning_run, "summary", fails)
    with pytest.raises(MemoryError):
        prune_channels(model, 0.5, DIGITS)
    assert all(t.data_ptr() == state[name].data_ptr() for name, t in model.state_dict().items())
    assert model.conv1.out_channels == 6


def test_a_network_that_does_something_else_each_time_is_refused() -> None:
    model = Capricious()
    weight = model.a.weight
    with pytest.raises(ValueError, match="`model`.*`b`"):
        prune_channels(model, 0.5, torch.ones(2, 4))
    assert model.a.weight is weight


@pytest.mark.parametrize(
    "change",
    [
        {"shapes": {"conv1.weight": [7, 1, 5, 5]}},
        {"shapes": {"conv1.weight": [3, 1, 5]}},
        {"shapes": {"conv1.weight": [0, 1, 5, 5]}},
        {"shapes": {"conv9.weight": [3, 1, 5, 5]}},
        {"attributes": {"conv1": {"forward": 3}}},
        {"attributes": {"conv9": {"groups": 3}}},
    ],
)
def test_a_description_of_another_network_is_refused(change: dict) -> None:
    model = lenet()
    description = {"shapes": {"fc1.weight": [60, 256]}, "attributes": {}}
    description = {key: value | change.get(key, {}) for key, value in description.items()}
    with pytest.raises(ValueError, match="`model`.*`(conv|fc)"):
        rebuild(model, description)
    assert model.fc1.weight.shape == (120, 256)


@pytest.mark.slow
def test_it_exports(tmp_path) -> None:
    pytest.importorskip("torch.export")
    for factory, inputs in (ALL["bottlenecks"], ALL["vit"]):
        model = factory().eval()
        prune_channels(model, 0.5, inputs)
        program = torch.export.export(model, (inputs,))
        torch.testing.assert_close(program.module()(inputs), model(inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bottlenecks", "vit"])
def test_it_exports_to_onnx(name: str, tmp_path) -> None:
    modern = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)  # before, half done
    pytest.importorskip("onnxscript" if modern else "onnx")
    runtime = pytest.importorskip("onnxruntime")
    factory, inputs = ALL[name]
    model = factory().eval()
    prune_channels(model, 0.5, inputs)
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own
        torch.onnx.export(model, (inputs,), str(path), dynamo=modern, verbose=False)
    session = runtime.InferenceSession(str(path))
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(inputs), rtol=1e-3, atol=1e-4)
