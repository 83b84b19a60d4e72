"""Operators and importances that a user defines, in `prune_channels`."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from helpers.channels import assert_same_numbers, distinct, normal
from torch import Tensor, nn

from drophot.prune import magnitude_prune
from drophot.structured import OperatorCall, Pruned, prune_channels

Rules = dict[Any, Callable[..., None]]


@torch.library.custom_op("drophot_doors::linear_relu", mutates_args=())
def linear_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (x @ weight.T + bias).relu()


@torch.library.custom_op("drophot_doors::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float = 0.5) -> Tensor:
    return (scale * q @ k.transpose(-1, -2)).softmax(-1) @ v


@torch.library.custom_op("drophot_doors::ranked", mutates_args=())
def ranked(x: Tensor) -> Tensor:
    return x.sort(-1).values


@torch.library.custom_op("drophot_doors::sum", mutates_args=())
def tripled(x: Tensor) -> Tensor:
    """It has the name of a built-in operator and does something else."""
    return 3 * x


def linear_relu_rule(call: OperatorCall, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    call.couple((x, -1), (weight, 1))
    call.couple((weight, 0), (bias, 0), (call.outputs[0], -1))


def attention_rule(call: OperatorCall, q: Tensor, k: Tensor, v: Tensor, scale: float = 0.5) -> None:
    call.couple((q, 1), (k, 1), (v, 1), (call.outputs[0], 1))
    call.couple((q, 3), (k, 3))
    call.couple((v, -1), (call.outputs[0], -1))


def channels_alike(call: OperatorCall, x: Tensor) -> None:
    call.couple((x, -1), (call.outputs[0], -1))


class LinearReLU(nn.Module):
    """A layer whose parameters only the operator reads."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return linear_relu(x, self.weight, self.bias)


class Heads(nn.Module):
    """Attention by an operator of four heads, each four wide."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 48), nn.Linear(16, 12)
        self.heads, self.width = 4, 4

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], 3, self.heads, self.width)
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)
        return self.out(attention(q, k, v).transpose(1, 2).flatten(2))


class Call(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def pruned_right(model: nn.Module, *inputs: Tensor, rules: Rules | None = None) -> Pruned:
    """Prune by the first inputs; the result has the values of zeroed channels for all inputs."""
    model = distinct(model)
    dense = deepcopy(model)
    pruned = prune_channels(model, 0.5, inputs[0], rules=rules)
    assert_same_numbers(dense, model, *inputs)
    return pruned


def fused() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), LinearReLU(16, 12), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)
    )


def between(middle: Callable[[Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), Call(middle), nn.Linear(16, 12), nn.Linear(12, 3))


def test_without_a_rule_the_layers_around_an_operator_are_left_and_named() -> None:
    pruned = pruned_right(fused(), normal(5, 6), normal(4, 6, seed=1))
    assert pruned.layers["0.weight"] == (16, 16)
    assert "`linear_relu` in `1`" in pruned.unpruned_layers["0.weight"]
    assert pruned.layers["2.weight"] == (8, 4)


@pytest.mark.parametrize(
    "operator",
    [
        linear_relu,
        torch.ops.drophot_doors.linear_relu,
        torch.ops.drophot_doors.linear_relu.default,
    ],
)
def test_with_a_rule_they_are_pruned_and_have_the_right_values(operator: Any) -> None:
    rules = {operator: linear_relu_rule}
    pruned = pruned_right(fused(), normal(5, 6), normal(4, 6, seed=1), rules=rules)
    assert pruned.layers == {
        "0.weight": (16, 8),
        "1.weight": (12, 6),  # the operator sums over its inputs, so it makes its outputs
        "2.weight": (8, 4),
        "4.weight": (3, 3),
    }
    assert pruned.unpruned_layers.keys() == {"4.weight"}


def test_heads_of_an_operator_lose_equally_many_channels_but_different_ones() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 12), Heads(), nn.Linear(12, 3))

    inputs = normal(2, 7, 5), normal(3, 9, 5, seed=1)
    assert "`attention` in `1`" in pruned_right(model(), *inputs).unpruned_layers["1.qkv.weight"]
    kept = pruned_right(model(), *inputs, rules={attention: attention_rule}).kept_channels[
        "1.qkv.weight"
    ]
    q, k, v = (kept[(kept >= 16 * i) & (kept < 16 * i + 16)] - 16 * i for i in range(3))
    assert torch.equal(q, k)
    for part in (q, v):
        assert (part // 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert len({tuple(head) for head in (part % 4).view(4, 2).tolist()}) > 1


def test_a_tensor_that_is_passed_several_times_is_coupled_with_itself() -> None:
    def to_itself(x: Tensor) -> Tensor:
        tokens = x[None, None]
        return attention(tokens, tokens, tokens)[0, 0]

    rules = {attention: attention_rule}
    pruned = pruned_right(between(to_itself), normal(5, 6), normal(4, 6, seed=1), rules=rules)
    assert pruned.layers["0.weight"] == (16, 8)


@pytest.mark.parametrize("rule", [channels_alike, None])
def test_a_rule_that_is_wrong_is_caught_by_value_and_the_layer_is_left(rule: Any) -> None:
    rules = None if rule is None else {ranked: rule}
    pruned = pruned_right(
        between(lambda x: ranked(x)), normal(5, 6), normal(4, 6, seed=1), rules=rules
    )
    assert pruned.layers["0.weight"] == (16, 16)
    assert pruned.layers["2.weight"] == (12, 6)
    assert "`ranked` in `1`" in pruned.unpruned_layers["0.weight"]
    assert ("other values" in pruned.unpruned_layers["0.weight"]) == (rule is not None)


def test_a_rule_replaces_the_built_in_one() -> None:
    def keeps_all(call: OperatorCall, *_: object) -> None:
        assert call.name == "relu"
        assert call.module == "1"
        assert len(call.inputs) == len(call.outputs) == 1

    assert pruned_right(between(torch.relu), normal(5, 6)).layers["0.weight"] == (16, 8)
    rules = {torch.ops.aten.relu: keeps_all}
    pruned = pruned_right(between(torch.relu), normal(5, 6), rules=rules)
    assert pruned.layers["0.weight"] == (16, 16)
    assert "`relu` in `1`" in pruned.unpruned_layers["0.weight"]
    assert (
        "size" not in pruned.unpruned_layers["0.weight"]
    )  # the rule kept them, not a failed check


def test_an_operator_with_the_name_of_a_built_in_one_does_not_get_its_rule() -> None:
    pruned = pruned_right(between(lambda x: tripled(x)), normal(5, 6), normal(4, 6, seed=1))
    assert pruned.layers["0.weight"] == (16, 8)


class OwnError(Exception):
    pass


def fails(call: OperatorCall, x: Tensor) -> None:
    raise OwnError("mine")


WRONG_RULES: dict[str, tuple[Callable[..., None], type[Exception], str]] = {
    "no such dimension": (
        lambda call, x: call.couple((x, 2), (call.outputs[0], 1)),
        ValueError,
        r"`ranked`.*2.*\(5, 16\)",
    ),
    "a negative one": (
        lambda call, x: call.couple((x, -3)),
        ValueError,
        r"`ranked`.*-3.*\(5, 16\)",
    ),
    "sizes differ": (
        lambda call, x: call.couple((x, 1), (x, 0)),
        ValueError,
        r"`ranked`.*\[16, 5\]",
    ),
    "another tensor": (
        lambda call, x: call.couple((x + 1, 1)),
        ValueError,
        r"`call.inputs`.*`ranked`.*\(5, 16\)",
    ),
    "too few arguments": (lambda call: None, TypeError, "`rules`.*ranked.*<lambda>"),
    "too many arguments": (lambda call, x, y: None, TypeError, "`rules`.*ranked.*'y'"),
    "a tensor without its dimension": (
        lambda call, x: call.couple(x, call.outputs[0]),
        TypeError,
        r"`couple`.*`ranked`.*\(5, 16\)",
    ),
    "a pair and a number": (
        lambda call, x: call.couple((x, 1), 1),
        TypeError,
        "`couple`.*`ranked`.* 1",
    ),
    "a dimension that is no integer": (
        lambda call, x: call.couple((x, 1.0)),
        TypeError,
        "`couple`.*`ranked`.*1.0",
    ),
    "an error of its own": (fails, OwnError, "mine"),
}


@pytest.mark.parametrize("name", WRONG_RULES)
def test_a_rule_that_cannot_be_is_an_error_and_nothing_is_changed(name: str) -> None:
    rule, error, message = WRONG_RULES[name]
    model = between(lambda x: ranked(x)).double()
    tensors = {key: (t, t.clone()) for key, t in model.state_dict().items()}
    with pytest.raises(error, match=message):
        prune_channels(model, 0.5, normal(5, 6), rules={ranked: rule})
    for key, tensor in model.state_dict().items():
        before, values = tensors[key]
        assert tensor.data_ptr() == before.data_ptr()
        assert torch.equal(tensor, values)


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ({"ranked": channels_alike}, ValueError, "`rules`.*'ranked'"),
        ({7: channels_alike}, TypeError, "`rules`.*7"),
        ({ranked: 3}, TypeError, r"`rules`.*3.*ranked"),
        ({ranked: nn.Linear}, TypeError, "`rules`.*Linear.*ranked"),
    ],
)
def test_rules_map_operators_to_functions(rules: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prune_channels(between(lambda x: ranked(x)).double(), 0.5, normal(5, 6), rules=rules)


def test_wrong_arguments_of_a_rule_are_found_before_the_model_is_called() -> None:
    model = between(lambda x: pytest.fail("called")).double()
    with pytest.raises(TypeError, match="`rules`.*ranked.*'y'"):
        prune_channels(model, 0.5, normal(5, 6), rules={ranked: lambda call, x, y: None})
    with pytest.raises(TypeError, match="`rules`.*softmax"):
        prune_channels(model, 0.5, normal(5, 6), rules={torch.ops.aten.softmax: lambda call: None})


def test_arguments_that_only_some_calls_have_are_found_when_they_are_passed() -> None:
    def rule(call: OperatorCall, x: Tensor, y: Tensor) -> None: ...

    model = between(lambda x: torch.ops.aten.add(x, x, alpha=2)).double()
    with pytest.raises(TypeError, match="`rules`.*add.*'alpha'"):
        prune_channels(model, 0.5, normal(5, 6), rules={torch.ops.aten.add.Tensor: rule})


@pytest.mark.parametrize(
    ("importance", "words"),
    [
        (nn.Linear, "`importance`.*Linear"),
        ("taylor", "`importance`.*taylor"),
        (lambda weight: weight, "`importance`.*weight"),
    ],
)
def test_an_importance_is_a_function_of_a_name_and_a_weight(importance: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        prune_channels(stack(), 0.5, torch.ones(2, 4), importance=importance)
    with pytest.raises(TypeError, match=words):
        magnitude_prune(stack(), 0.5, importance=importance)


def stack() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


def by_magnitude(name: str, weight: Tensor) -> Tensor:
    return weight.square()


def test_the_default_importance_is_the_square_of_each_weight() -> None:
    one, other = stack(), stack()
    kept = prune_channels(one, 0.5, torch.ones(2, 4)).kept_channels
    same = prune_channels(other, 0.5, torch.ones(2, 4), importance=by_magnitude).kept_channels
    assert all(torch.equal(index, same[name]) for name, index in kept.items())
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_values_per_output_channel_decide_and_higher_is_kept() -> None:
    values = {
        "0.weight": torch.tensor([5.0, 0.0, 7.0, 1.0, 2.0, 6.0, 3.0, 4.0]),
        "2.weight": torch.tensor([0, 1, 0, 1, 0, 1]),  # of integers, on any device
        "4.weight": torch.zeros(2),
    }
    pruned = prune_channels(
        stack(), 0.5, torch.ones(2, 4), importance=lambda name, weight: values[name]
    )
    assert pruned.kept_channels["0.weight"].tolist() == [0, 2, 5, 7]
    assert pruned.kept_channels["2.weight"].tolist() == [1, 3, 5]


def test_skipped_layers_have_no_importance() -> None:
    names: list[str] = []

    def named(name: str, weight: Tensor) -> Tensor:
        names.append(name)
        return by_magnitude(name, weight)

    pruned = prune_channels(stack(), 0.5, torch.ones(2, 4), skip=["4"], importance=named)
    assert names == ["0.weight", "2.weight"]
    same = prune_channels(stack(), 0.5, torch.ones(2, 4), skip=["4"])
    assert (
        same.layers == pruned.layers == {"0.weight": (8, 4), "2.weight": (6, 6), "4.weight": (2, 2)}
    )
    assert torch.equal(pruned.kept_channels["0.weight"], same.kept_channels["0.weight"])


def test_values_per_weight_count_where_a_channel_is_read_too() -> None:
    def importance(name: str, weight: Tensor) -> Tensor:
        values = torch.ones_like(weight)
        if name == "2.weight":
            values[:, [1, 2, 4, 7]] += 1  # what it reads
        return values

    pruned = prune_channels(stack(), 0.5, torch.ones(2, 4), importance=importance)
    assert pruned.kept_channels["0.weight"].tolist() == [1, 2, 4, 7]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(x + self.b(x.relu()))


def test_the_values_of_coupled_layers_are_divided_by_their_mean_and_added() -> None:
    a = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 9.0])
    b = torch.tensor([900.0, 100.0, 800.0, 200.0, 300.0, 100.0])
    values = {"a.weight": a, "b.weight": b, "c.weight": torch.ones(2)}
    pruned = prune_channels(
        Residual(), 0.5, torch.ones(2, 4), importance=lambda name, weight: values[name]
    )
    best = (a / a.mean() + b / b.mean()).topk(3).indices.sort().values
    assert best.tolist() not in (a.topk(3).indices.sort().values.tolist(), [0, 2, 4])
    assert torch.equal(pruned.kept_channels["a.weight"], best)
    assert torch.equal(pruned.kept_channels["b.weight"], best)


def test_output_channels_of_a_transposed_convolution_are_in_dimension_1() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 8, 2), nn.Conv2d(8, 4, 1))
    shapes = {}

    def importance(name: str, weight: Tensor) -> Tensor:
        shapes[name] = tuple(weight.shape)
        return torch.arange(weight.shape[1 if name == "0.weight" else 0])

    pruned = prune_channels(model, 0.5, torch.ones(2, 3, 4, 4), importance=importance)
    assert shapes == {"0.weight": (3, 8, 2, 2), "1.weight": (4, 8, 1, 1)}
    assert pruned.kept_channels["0.weight"].tolist() == [4, 5, 6, 7]


def test_an_importance_may_read_gradients() -> None:
    model = stack()
    model(torch.ones(2, 4)).sum().backward()
    grads = {name: p.grad.abs().sum(1) for name, p in model.named_parameters() if p.dim() > 1}
    pruned = prune_channels(
        model, 0.5, torch.ones(2, 4), importance=lambda name, weight: weight.grad.abs().sum(1)
    )
    best = grads["0.weight"].sort(descending=True, stable=True).values[:4]
    assert torch.equal(
        grads["0.weight"][pruned.kept_channels["0.weight"]].sort(descending=True).values, best
    )


def raises(name: str, weight: Tensor) -> Tensor:
    raise KeyError(name)


@pytest.mark.parametrize(
    ("importance", "error", "message"),
    [
        (lambda name, weight: weight.sum(), ValueError, r"`importance`.*\(8,\).*\(8, 4\).*\(\)"),
        (lambda name, weight: torch.ones(4), ValueError, r"`importance`.*\(8,\).*\(4,\)"),
        (lambda name, weight: 1.0, ValueError, r"`importance`.*float"),
        (lambda name, weight: -weight.abs(), ValueError, "`importance`.*-0.*`0.weight`"),
        (lambda name, weight: weight * torch.nan, ValueError, "`importance`.*nan"),
        (lambda name, weight: weight.abs() / 0, ValueError, "`importance`.*inf"),
        (raises, KeyError, "0.weight"),
    ],
)
def test_an_importance_that_cannot_rank_is_an_error_and_nothing_is_changed(
    importance: Any, error: type[Exception], message: str
) -> None:
    model = stack()
    before = dict(model.named_parameters())
    with pytest.raises(error, match=message):
        prune_channels(model, 0.5, torch.ones(2, 4), importance=importance)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    ("importance", "error", "match"),
    [
        (lambda name, w: w.to(torch.complex128), TypeError, r"`importance`.*complex128.*weight"),
        (lambda name, w: w.abs().to(torch.float8_e5m2), TypeError, r"`importance`.*float8"),
        (lambda name, w: w.abs().to_sparse(), ValueError, r"`importance`.*sparse.*weight"),
        (lambda name, w: w.abs().to("meta"), ValueError, r"`importance`.*meta.*weight"),
    ],
)
def test_tensors_that_cannot_be_ranked(importance: Any, error: type[Exception], match: str) -> None:
    model = between(torch.relu)
    with pytest.raises(error, match=match):
        prune_channels(model, 0.5, torch.ones(2, 6), importance=importance)


def test_importances_whose_sum_exceeds_float16() -> None:
    def by_index(name: str, weight: Tensor) -> Tensor:
        order = torch.arange(1.0, len(weight) + 1).view(-1, 1, 1, 1)
        return (2000 * order * torch.ones_like(weight)).half()

    model = nn.Sequential(nn.Conv2d(1, 8, 7), nn.ReLU(), nn.Conv2d(8, 2, 3))
    pruned = prune_channels(model, 0.5, torch.ones(1, 1, 9, 9), importance=by_index)
    assert pruned.kept_channels["0.weight"].tolist() == [4, 5, 6, 7]
