"""Plans of what would be removed: made, printed, stored, edited and applied."""

import json
from collections import OrderedDict
from copy import deepcopy
from typing import Any

import pytest
import torch
from helpers.channels import assert_same_numbers, distinct, normal
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from drophot.structured import Budget, ChannelPlan, plan_channels, prune_channels, rebuild


class Residual(nn.Module):
    """A stream that a block adds to, with a width that the code reads from an attribute."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.width = width
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.first = nn.Conv2d(width, 10, 1)
        self.second = nn.Conv2d(10, width, 1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = x + self.second(self.first(x).relu())
        return self.head(x.relu().view(len(x), self.width, -1).mean(-1))


IMAGES = normal(2, 3, 5, 5)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that pruning could change."""
    tensors = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    widths = {name: dict(vars(module)) for name, module in model.named_modules()}
    plain = {
        (name, key): value
        for name, own in widths.items()
        for key, value in own.items()
        if isinstance(value, int | tuple)
    }
    return {"tensors": tensors, "plain": plain}


def plan_of(model: nn.Module, **budget: Any) -> ChannelPlan:
    return plan_channels(model, example_inputs=IMAGES, to=Budget(**budget))


@pytest.mark.parametrize("arguments", [{"ratio": 0.5}, {"to": Budget(parameters=400)}])
def test_applying_does_what_pruning_does(arguments: dict[str, Any]) -> None:
    dense = distinct(Residual())
    before = state(dense)
    plan = plan_channels(dense, example_inputs=IMAGES, **arguments)
    after = state(dense)
    assert after["plain"] == before["plain"]
    for name, (identity, value) in before["tensors"].items():
        assert after["tensors"][name][0] == identity
        assert torch.equal(after["tensors"][name][1], value)

    one, other = deepcopy(dense), deepcopy(dense)
    expected = prune_channels(one, example_inputs=IMAGES, **arguments)
    found = ChannelPlan.from_json(plan.to_json()).apply(other, IMAGES)
    assert plan.layers == found.layers == expected.layers
    assert plan.parameters == found.parameters == expected.parameters
    assert plan.flops == found.flops
    assert plan.bytes == found.bytes
    assert found.ratio is found.budget is None
    assert isinstance(one.width, int)
    assert other.width == one.width < 12
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


def test_a_plan_is_json() -> None:
    plan = plan_of(distinct(Residual()), parameters=400)
    assert ChannelPlan.from_json(plan.to_json()) == plan
    edited = plan.keep("stem.weight", range(12))
    assert ChannelPlan.from_json(edited.to_json()) == edited
    for text in ("", "[]", '{"removed": {}}'):
        with pytest.raises(ValueError, match=r"`text`"):
            ChannelPlan.from_json(text)


def test_edits_change_coupled_layers_too() -> None:
    dense = distinct(Residual())
    plan = plan_of(dense, parameters=400)
    kept = next(i for i in range(12) if i not in plan.removed["stem.weight"])
    gone = plan.removed["stem.weight"][0]
    edited = plan.remove("second.weight", [kept]).keep("stem.weight", [gone])
    expected = sorted({*plan.removed["stem.weight"], kept} - {gone})
    assert list(edited.removed["stem.weight"]) == expected
    assert edited.removed["second.weight"] == edited.removed["stem.weight"]
    assert edited.removed["first.weight"] == plan.removed["first.weight"]
    assert edited.parameters is edited.flops is edited.bytes is None
    assert "edited" in str(edited)
    model = deepcopy(dense)
    pruned = edited.apply(model, IMAGES)
    assert_same_numbers(dense, model, IMAGES)
    assert pruned.kept_channels["stem.weight"].tolist() == [
        i for i in range(12) if i not in expected
    ]


def test_a_plan_made_by_hand() -> None:
    dense = distinct(Residual())
    plan = plan_channels(dense, 0.0, IMAGES).remove("first.weight", [0, 3, 4, 5])
    assert plan.layers["first.weight"] == (10, 6)
    model = deepcopy(dense)
    pruned = plan.apply(model, IMAGES)
    assert_same_numbers(dense, model, IMAGES)
    assert pruned.layers == plan.layers
    assert model.stem.out_channels == 12
    line = next(line for line in str(plan).splitlines() if line.startswith("first.weight"))
    assert " ".join(line.split()) == "first.weight 10 to 6 40.0% removed channels 0, 3-5"
    assert "an output of the network" in str(plan)


def test_whole_heads() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(6, 48), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, -1, 4).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-1, -2) * k.shape[-1] ** -0.5).softmax(-1)
            return self.out((weights @ v).transpose(1, 2).flatten(2))

    dense, tokens = distinct(Attention()), normal(2, 5, 6)
    plan = plan_channels(dense, 0.5, tokens)
    assert plan.layers["qkv.weight"] == (48, 24)
    model = deepcopy(dense)
    ChannelPlan.from_json(plan.to_json()).apply(model, tokens)
    assert_same_numbers(dense, model, tokens)
    assert model.out.in_features == 8


def test_skipped_layers() -> None:
    dense = distinct(Residual())
    plan = plan_channels(dense, 0.5, IMAGES, skip=["stem"])
    assert plan.removed["stem.weight"] == ()
    assert "stem" in plan.reasons["second.weight"]
    plan.apply(deepcopy(dense), IMAGES)
    with pytest.raises(ValueError, match=r"channel 2 of `(stem|second)\.weight`.*stem"):
        plan.remove("stem.weight", [2]).apply(dense, IMAGES)


def test_a_plan_that_does_not_fit() -> None:
    dense = distinct(Residual())
    plan = plan_channels(dense, 0.5, IMAGES)
    with pytest.raises(ValueError, match=r"`model`.*`stem\.weight`.*8.*12"):
        plan.apply(Residual(8).double(), IMAGES)
    with pytest.raises(ValueError, match=r"`model`.*`stem\.weight`"):
        plan.apply(nn.Sequential(nn.Linear(3, 2)).double(), normal(1, 3))
    with pytest.raises(ValueError, match=r"channel 1 of `head\.weight`.*output of the network"):
        plan_channels(dense, 0.0, IMAGES).remove("head.weight", [1]).apply(dense, IMAGES)
    assert dense.stem.out_channels == 12


def test_coupled_channels_that_a_plan_separates() -> None:
    dense = distinct(Residual())
    plan = plan_channels(dense, 0.0, IMAGES)
    text = plan.to_json().replace('"stem.weight": []', '"stem.weight": [3]', 1)
    with pytest.raises(ValueError, match=r"channel 3 of `second\.weight`"):
        ChannelPlan.from_json(text).apply(dense, IMAGES)
    assert dense.width == 12


def test_groups_have_to_lose_equally_many() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    model = distinct(model)
    plan = plan_channels(model, 0.0, IMAGES).remove("1.weight", [0, 1])
    with pytest.raises(ValueError, match=r"same number.*`1\.weight"):
        plan.apply(model, IMAGES)
    plan.remove("1.weight", [6]).keep("1.weight", [1]).apply(model, IMAGES)
    assert model[1].out_channels == 6


@pytest.mark.parametrize(
    ("layer", "channels", "error", "match"),
    [
        ("stem", [0], ValueError, r"`layer`.*'stem'.*stem\.weight"),
        ("first.weight", [10], ValueError, r"`channels`.*10"),
        ("first.weight", [-1], ValueError, r"`channels`.*-1"),
        ("first.weight", [0.5], TypeError, r"`channels`.*0\.5"),
        ("first.weight", range(10), ValueError, r"`channels`.*first\.weight"),
    ],
)
def test_edits_are_checked(layer: str, channels: Any, error: type[Exception], match: str) -> None:
    plan = plan_channels(distinct(Residual()), 0.0, IMAGES)
    with pytest.raises(error, match=match):
        plan.remove(layer, channels)


@pytest.mark.parametrize("gone", [[99], [-1], [1, 1], [1, 0], [True], ["x"], [0, 1.0], "x", None])
def test_a_stored_plan_with_impossible_channels_is_refused(gone: Any) -> None:
    values = json.loads(plan_of(distinct(Residual()), parameters=400).to_json())
    values["removed"]["stem.weight"] = gone
    with pytest.raises(ValueError, match="`text` must be the JSON of a ChannelPlan"):
        ChannelPlan.from_json(json.dumps(values))
    values["removed"] = []
    with pytest.raises(ValueError, match="`text` must be the JSON of a ChannelPlan"):
        ChannelPlan.from_json(json.dumps(values))


def test_a_stored_plan_has_to_leave_each_layer_a_channel() -> None:
    values = json.loads(
        plan_channels(
            nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), 0.0, torch.ones(1, 4)
        ).to_json()
    )
    values["removed"]["0.weight"] = [0, 1, 2]
    with pytest.raises(ValueError, match=r"`text` .*`0.weight`.* 3"):
        ChannelPlan.from_json(json.dumps(values))


def stored(**changes: Any) -> str:
    """The JSON of a plan of `dense_chain`, with other values of some fields."""
    values = json.loads(plan_channels(dense_chain(), 0.5, torch.ones(1, 4)).to_json())
    return json.dumps(values | changes)


def dense_chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("removed", {"0.weight": [0]}),
        ("removed", {"0.weight": [], "2.weight": [], "other.weight": [1]}),
        ("channels", {"0.weight": [0, 1, 2, 3, 4, 5]}),
        ("channels", {"0.weight": "abcdef", "2.weight": [6, 7]}),
        ("channels", {"0.weight": ["a"] * 6, "2.weight": [6, 7]}),
        ("channels", {"0.weight": [0] * 6, "2.weight": [6, 7]}),
        ("channels", []),
        ("reasons", None),
        ("reasons", {"0.weight": 3}),
        ("request", 5),
        ("parameters", "ab"),
        ("parameters", [1]),
        ("flops", [2.5, 1]),
        ("bytes", [-4, 2]),
        ("latency", [1]),
        ("latency", [1, None]),
        ("skip", "stem"),
        ("skip", [3]),
        ("whole_heads", [["x", 3]]),
        ("whole_heads", [5]),
        ("digests", None),
    ],
)
def test_each_field_of_a_stored_plan_is_checked(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`text`.*`{field}`") as error:
        ChannelPlan.from_json(stored(**{field: value}))
    if isinstance(value, dict):
        assert "weight" in str(error.value)
    else:
        assert repr(value) in str(error.value)


def test_costs_do_not_outlast_an_edit_of_the_text() -> None:
    plan = plan_channels(dense_chain(), 0.5, torch.ones(1, 4))
    assert plan.parameters == (44, 23)
    edited = ChannelPlan.from_json(stored(removed={"0.weight": [0], "2.weight": []}))
    assert edited == plan.keep("0.weight", range(6)).remove("0.weight", [0])
    assert edited.parameters is edited.flops is edited.bytes is edited.latency is None
    assert "(edited)" in str(edited)
    assert "not computed" in str(edited)
    assert "not computed" not in str(plan)
    assert ChannelPlan.from_json(edited.to_json()) == edited
    assert edited.apply(dense_chain(), torch.ones(1, 4)).layers["0.weight"] == (6, 5)


def test_a_plan_prints_the_latency() -> None:
    plan = plan_channels(dense_chain(), example_inputs=torch.ones(1, 4), to=Budget(latency=4567.89))
    assert plan.latency is not None
    assert "at most 4,568 ms" in str(plan)
    found = next(line for line in str(plan).splitlines() if line.startswith("latency"))
    assert found.split()[-1] == "ms"
    assert f"{plan.latency[0]:.3g}" in found
    assert ChannelPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("layer", "channels", "match"),
    [
        ("0.weight", 3, r"`channels`.*3.*\[3\]"),
        ("0.weight", "12", r"`channels`.*'12'"),
        (None, [0], r"`layer`.*None"),
        (["0.weight"], [0], r"`layer`.*0\.weight"),
    ],
)
def test_edits_name_an_argument_of_the_wrong_type(layer: Any, channels: Any, match: str) -> None:
    plan = plan_channels(dense_chain(), 0.5, torch.ones(1, 4))
    for edit in (plan.keep, plan.remove):
        with pytest.raises(TypeError, match=match):
            edit(layer, channels)


class Mixed(nn.Module):
    """`nn.MultiheadAttention` in a stream, whose width has to fit its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.mix = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.mix(x, x, x, need_weights=False)[0])


def test_an_edit_that_does_not_fit_the_heads_is_named() -> None:
    tokens = normal(2, 5, 6)
    plan = plan_channels(distinct(Mixed()), 0.0, tokens).remove("embed.weight", [5])
    with pytest.raises(ValueError, match=r"15 of 16 in `embed\.weight`.*`mix`.*heads") as error:
        plan.apply(distinct(Mixed()), tokens)
    assert "channel 5" not in str(error.value)


def wrappings() -> dict[str, Any]:
    return {
        "compiled": lambda model: torch.compile(model, backend="eager"),
        "parallel": nn.DataParallel,
        "averaged": AveragedModel,
    }


@pytest.mark.parametrize("name", list(wrappings()))
def test_a_plan_fits_a_wrapped_model_and_the_other_way_round(name: str) -> None:
    wrap, dense = wrappings()[name], distinct(Residual())
    plain, wrapped = deepcopy(dense), wrap(deepcopy(dense))
    plan = plan_channels(dense, 0.5, IMAGES, skip=["head.bias"])
    of_wrapped = plan_channels(wrap(dense), 0.5, IMAGES, skip=[f"{_prefix(wrapped)}head.bias"])
    expected = plan.apply(plain, IMAGES)
    assert plain.width == 6
    pruned = plan.apply(wrapped, IMAGES)
    assert torch.equal(wrapped(IMAGES), plain(IMAGES))
    assert list(pruned.layers.values()) == list(expected.layers.values())
    again = deepcopy(dense)
    of_wrapped.apply(again, IMAGES)
    assert torch.equal(again(IMAGES), plain(IMAGES))
    for description in (pruned.description, expected.description):
        rebuilt = rebuild(distinct(Residual()), description)
        rebuilt.load_state_dict(plain.state_dict())
        assert torch.equal(rebuilt.eval()(IMAGES), plain.eval()(IMAGES))
        assert rebuild(wrap(distinct(Residual())), description)(IMAGES).shape == (2, 4)


def _prefix(wrapped: nn.Module) -> str:
    return f"{next(path for path, _ in wrapped.named_children())}."


def test_whole_heads_of_a_wrapped_model() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(6, 48), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, -1, 4).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-1, -2) * k.shape[-1] ** -0.5).softmax(-1)
            return self.out((weights @ v).transpose(1, 2).flatten(2))

    dense, tokens = distinct(Attention()), normal(2, 5, 6)
    plan = plan_channels(dense, 0.5, tokens)
    assert plan.whole_heads == (("", 4),)
    wrapped = nn.DataParallel(deepcopy(dense))
    assert plan.apply(wrapped, tokens).layers["module.qkv.weight"] == (48, 24)


class Named(nn.Module):
    """A model with a child that is named like the attribute of a wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(5, 8)
        self.width = 8

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x).reshape(-1, self.width)


def test_a_child_named_module_in_a_wrapped_model() -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(OrderedDict(enc=Named(), head=nn.Linear(8, 3)))

    pruned = prune_channels(distinct(make()), 0.5, normal(2, 5))
    wrapped = rebuild(nn.DataParallel(make()), pruned.description)
    assert wrapped.module.enc.width == 4
    assert wrapped.module.enc.module.weight.shape == (4, 5)
