"""Which weights are pruned, and what is said about the matrices that are not."""

import copy
import re
from typing import Any

import pytest
import torch
from helpers.said import warned, zeros
from torch import Tensor, nn

from drophot import DropHot, Masks, magnitude_prune
from drophot.prune import Schedule


class Experts(nn.Module):
    """A mixture of experts that keeps its weights in tensors of three dimensions."""

    def __init__(self, experts: int = 4, width: int = 8) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, 2 * width))
        self.up_bias = nn.Parameter(torch.randn(experts, 2 * width))
        self.down = nn.Parameter(torch.randn(experts, 2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bi,eio->ebo", x, self.up) + self.up_bias[:, None]
        return torch.einsum("be,ebo->bo", self.gate(x).softmax(1), hidden.relu() @ self.down)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), Experts(), nn.Linear(8, 4))


def test_what_is_left_dense_is_named_with_its_share() -> None:
    model = network()
    share = 1024 / (1024 + 64 + 32 + 32)
    with pytest.warns(UserWarning, match=re.escape(f"{share:.1%} of the model's matrix weights")):
        masks = magnitude_prune(model, 0.5)
    assert list(masks) == ["0.weight", "1.gate.weight", "2.weight"]
    assert zeros(model) == pytest.approx(0.5 * (1 - share))
    (message,) = warned(lambda: Masks.from_zeros(model))
    assert "`1.up` (Experts), `1.down` (Experts)" in message
    assert "up_bias" not in message


def test_a_long_list_is_cut() -> None:
    model = nn.Sequential(nn.Linear(4, 4), *(Experts() for _ in range(6)))
    (message,) = warned(lambda: magnitude_prune(model, 0.5))
    assert message.count("Experts") == 3
    assert "and 9 more" in message


@pytest.mark.parametrize("include", [("1",), ("1.up", "1.down"), ("1.up", "1", "0.weight")])
def test_include_prunes_them_too(include: tuple[str, ...]) -> None:
    model, reference = network(), network()
    masks = magnitude_prune(model, 0.5, include=include)
    assert list(masks) == ["0.weight", "1.up", "1.down", "1.gate.weight", "2.weight"]
    assert zeros(model) == pytest.approx(0.5)
    assert masks.sparsity == pytest.approx(0.5)
    ranked = torch.cat([reference.get_parameter(n).detach().flatten() for n in masks]).abs()
    assert int((ranked[ranked < ranked.median()] == 0).sum()) == 0
    kept = torch.cat([masks[name].flatten() for name in masks])
    assert ranked[~kept].max() <= ranked[kept].min()
    assert (model[1].up_bias != 0).all()  # pyright: ignore[reportArgumentType,reportOperatorIssue]
    again = Masks.from_zeros(model, include=include)
    assert all(torch.equal(again[name], masks[name]) for name in masks)


@pytest.mark.parametrize("scope", ["global", "layer", "erk", "lamp"])
def test_included_weights_are_ranked_like_any(scope: Any) -> None:
    masks = magnitude_prune(network(), 0.5, scope=scope, include=("1",))
    assert masks.sparsity == pytest.approx(0.5, abs=0.01)
    assert masks["1.up"].shape == (4, 8, 16)


def test_names_of_parameters_include_what_modules_do_not() -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    assert list(magnitude_prune(model, 0.5, include=("0.weight", "2.bias"))) == [
        "0.weight",
        "2.weight",
        "2.bias",
    ]
    for nothing in ("0", "1", ""):
        with pytest.raises(ValueError, match=f"`include`.*{nothing!r}"):
            magnitude_prune(model, 0.5, include=(nothing,))


def test_skip_goes_before_include() -> None:
    masks = magnitude_prune(network(), 0.5, include=("1",), skip=("1.down",))
    assert "1.up" in masks
    assert "1.down" not in masks
    with pytest.raises(ValueError, match="`include` and `skip`.*'1'"):
        magnitude_prune(network(), 0.5, include=("1",), skip=("1",))


@pytest.mark.parametrize("option", ["include", "skip"])
@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("1", TypeError, "collection of names.*'1'"),
        (1, TypeError, "collection of names.*1"),
        (None, TypeError, "collection of names.*NoneType"),
        ([1], TypeError, "names.*1"),
        ([["1"]], TypeError, "names.*list"),
        (b"1", TypeError, "names.*49"),
        ([nn.Linear(1, 1)], TypeError, "names.*Linear"),
        (["1.upp"], ValueError, "'1.upp'.*'1.up'"),
    ],
)
def test_names_are_checked(option: str, names: Any, error: type[Exception], message: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    for prune in (
        lambda: magnitude_prune(model, 0.5, **{option: names}),
        lambda: Masks.from_zeros(model, **{option: names}),
        lambda: Schedule(model, [0.5], every=1, **{option: names}),
    ):
        with pytest.raises(error, match=f"`{option}`.*{message}"):
            prune()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_a_parametrization_computes_is_not_included() -> None:
    model = network()
    nn.utils.parametrizations.orthogonal(model[1], "up")
    with pytest.raises(ValueError, match="`include`.*1.parametrizations.up"):
        magnitude_prune(model, 0.5, include=("1",))


def test_skip_is_the_way_to_say_that_it_should_be_so() -> None:
    assert list(magnitude_prune(network(), 0.5, skip=("1",))) == ["0.weight", "2.weight"]


@pytest.mark.parametrize(("width", "says"), [(100, False), (99, True)])
def test_a_trifle_is_not_worth_a_word(width: int, says: bool) -> None:
    model = nn.Sequential(nn.Linear(99, width, bias=False), nn.Module())
    model[1].register_parameter("mixing", nn.Parameter(torch.ones(10, 10)))
    assert bool(warned(lambda: magnitude_prune(model, 0.5))) == says  # 100 of 10,000 and 9,901


def test_tables_biases_and_tokens_are_no_matrices() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Embedding(50, 8), nn.LayerNorm((4, 4)), nn.Module())
    for name in (
        "pos_embed",
        "pos_embed_0",
        "position_embeddings",
        "rel_pos_h",
        "relative_position_bias_table",
        "up_proj_bias",
        "bias_u",
        "reg_token",
        "latents",
    ):
        model[3].register_parameter(name, nn.Parameter(torch.ones(4, 4)))
    magnitude_prune(model, 0.5)
    for name in ("proj", "weight", "in_proj_weight", "pos_proj", "query", "tokens_to_keys"):
        other = copy.deepcopy(model)
        other[3].register_parameter(name, nn.Parameter(torch.ones(4, 4)))
        assert f"`3.{name}`" in warned(lambda other=other: magnitude_prune(other, 0.5))[0]


def test_quantised_layers_of_others_are_counted() -> None:
    model = network()[:1]
    model.append(nn.Module())
    model[1].register_buffer("qweight", torch.ones(8, 16, dtype=torch.int32))
    model[1].register_buffer("mask", torch.ones(8, 16, dtype=torch.int32))
    (message,) = warned(lambda: magnitude_prune(model, 0.5))
    assert message.startswith("66.7% of")
    assert "`1.qweight` (Module, packed)" in message


@pytest.mark.filterwarnings("ignore")  # torch's own quantisation is on its way out
def test_layers_that_torch_quantised_are_counted() -> None:
    if torch.backends.quantized.engine == "none":
        pytest.skip("torch without quantisation")
    model = nn.Sequential(nn.Conv2d(1, 1, 2), nn.Linear(8, 8))
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    (message,) = warned(lambda: magnitude_prune(model, 0.5))
    assert message.startswith("94.1% of")
    assert "`1.weight` (Linear, packed)" in message


def test_a_model_of_nothing_else_is_refused_by_the_names() -> None:
    model = nn.Module()
    model.register_parameter("mix", nn.Parameter(torch.ones(4, 4)))
    with pytest.raises(ValueError, match="`model`.*Module.* in `include`: mix"):
        magnitude_prune(model, 0.5)
    assert magnitude_prune(model, 0.5, include=("mix",)).sparsity == 0.5
    with pytest.raises(ValueError, match="`model`.*`skip`"):
        magnitude_prune(model, 0.5, skip=("mix",))


def test_a_schedule_says_it_once() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train() -> None:
        schedule = Schedule(model, [0.2, 0.4, 0.6], every=1)
        with schedule.hold(optimizer):
            for _ in range(3):
                model(torch.randn(4, 8)).sum().backward()
                optimizer.step()
        assert schedule.masks.sparsity == pytest.approx(0.6, abs=0.01)

    assert len(warned(train)) == 1
    schedule = Schedule(network(), [0.2, 0.4], every=1, include=("1",))
    schedule.step()
    assert schedule.masks.sparsity == pytest.approx(0.4, abs=0.01)
    assert "1.up" in schedule.masks


def test_a_run_says_it_before_it_trains() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(16, 8), torch.arange(16) % 4)
    runs: list[DropHot] = []

    def make() -> None:
        runs.append(
            DropHot(
                network,
                data,
                data,
                data_ratio=0.5,
                mode="random",
                prune_ratio=0.5,
                score_epochs=1,
                train_epochs=1,
                finetune_epochs=1,
            )
        )

    assert len(warned(make)) == 1
    record = runs[0].run()  # which says nothing more
    assert record.sparsity == pytest.approx(0.5)  # of the prunable weights
    assert zeros(runs[0].model) < 0.1  # pyright: ignore[reportArgumentType]
    run = runs[0].replace()
    run.select()
    model = run.train()
    run.masks = magnitude_prune(model, 0.5, include=("1",))
    run.pruned_accuracy = 0.0
    assert run.finetune().sparsity == pytest.approx(zeros(model), abs=0.01)
    assert zeros(model) == pytest.approx(0.5, abs=0.01)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    "layer",
    [
        nn.RNN(6, 4, num_layers=2, bidirectional=True),
        nn.LSTM(6, 4, num_layers=2),
        nn.LSTM(6, 4, proj_size=3, bidirectional=True),
        nn.GRU(6, 4, batch_first=True),
    ],
)
def test_recurrent_layers(layer: nn.RNNBase) -> None:
    flat = [weight.data_ptr() for weight in layer._flat_weights]
    masks = magnitude_prune(layer, 0.75, scope="layer")
    matrices = {name: p for name, p in layer.named_parameters() if p.dim() == 2}
    assert list(masks) == list(matrices)
    for name, weight in matrices.items():
        assert int((weight == 0).sum()) == int(0.75 * weight.numel() + 0.5), name
    assert flat == [weight.data_ptr() for weight in layer._flat_weights]  # cuDNN's one block
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    with masks.hold(optimizer):
        layer(torch.randn(5, 2, 6))[0].sum().backward()
        optimizer.step()
    assert Masks.from_zeros(layer).sparsity == masks.sparsity


@pytest.mark.parametrize("cell", [nn.RNNCell(6, 4), nn.LSTMCell(6, 4), nn.GRUCell(6, 4)])
def test_cells(cell: nn.Module) -> None:
    assert list(magnitude_prune(cell, 0.5)) == ["weight_ih", "weight_hh"]


def test_patterns_of_recurrent_and_bilinear_layers() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(8, 4), "two": nn.Bilinear(4, 4, 4)})
    with pytest.warns(UserWarning, match=r"two.weight \(its input dimension is not known"):
        masks = magnitude_prune(model, 0.5, pattern="2:4")
    assert list(masks) == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    for mask in masks.values():
        assert (mask.view(-1, 4).sum(1) == 2).all()
    assert list(magnitude_prune(model, 0.5)) == [*masks, "two.weight"]
