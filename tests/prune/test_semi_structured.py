"""N of each M weights, and torch's accelerated form of them."""

import warnings
from copy import deepcopy

import numpy as np
import pytest
import torch
from helpers import references
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from drophot.prune import magnitude_prune, semi_structured, to_semi_structured

PATTERNS = {"2:4": 0.5, "1:4": 0.75, "4:8": 0.5, "3:4": 0.25, "1:2": 0.5}


@given(
    st.sampled_from(list(PATTERNS)),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 1000),
    st.booleans(),
)
def test_it_is_the_definition_along_the_inputs(
    pattern: str, rows: int, groups: int, seed: int, ties: bool
) -> None:
    torch.manual_seed(seed)
    kept, of = map(int, pattern.split(":"))
    model = nn.Linear(groups * of, rows)
    warnings.filterwarnings("ignore", ".*Masks.from_zeros")
    if ties:
        model.weight.data.round_(decimals=1)
    before = model.weight.detach().clone()
    masks = magnitude_prune(model, PATTERNS[pattern], pattern=pattern)
    expected = [references.kept_of_each(row, kept, of) for row in before.tolist()]
    assert masks["weight"].tolist() == expected
    assert torch.equal(model.weight, before * masks["weight"])
    counts = masks["weight"].view(-1, of).sum(1)
    assert counts.tolist() == [kept] * len(counts)


@pytest.mark.parametrize("ratio", [2 / 3, 0.66, 0.67, 0.666, 0.667, 0.666667, np.float16(2 / 3)])
def test_a_ratio_may_be_rounded_as_one_writes_it(ratio: float) -> None:
    masks = magnitude_prune(nn.Linear(9, 4), ratio, pattern="1:3")
    assert masks["weight"].view(-1, 3).sum(1).tolist() == [1] * 12


@pytest.mark.parametrize(
    ("layer", "dim"),
    [
        (nn.Conv2d(8, 6, 3), 1),
        (nn.Conv1d(8, 6, 3, groups=2), 1),
        (nn.ConvTranspose2d(8, 6, 3), 0),
    ],
)
def test_the_groups_are_along_the_input_channels(layer: nn.Module, dim: int) -> None:
    before = layer.weight.detach().clone()
    mask = magnitude_prune(layer, 0.5, pattern="2:4")["weight"]
    assert mask.is_contiguous()
    rows = before.movedim(dim, -1).reshape(-1, 4).tolist()
    expected = [references.kept_of_each(row, 2, 4) for row in rows]
    assert mask.movedim(dim, -1).reshape(-1, 4).tolist() == expected


def test_attention_too_and_large_weights_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 2)
    other = deepcopy(model)
    masks = magnitude_prune(model, 0.5, pattern="2:4")
    assert set(masks) == {"in_proj_weight", "out_proj.weight"}
    assert masks.sparsity == 0.5
    monkeypatch.setattr(semi_structured, "_BLOCK", 64)
    same = magnitude_prune(other, 0.5, pattern="2:4")
    assert all(torch.equal(mask, same[name]) for name, mask in masks.items())


def test_it_is_held_like_any_mask() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with magnitude_prune(model, 0.5, pattern="2:4").hold(optimizer):
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(16, 8)).square().sum().backward()
            optimizer.step()
    for layer in (model[0], model[2]):
        assert (layer.weight.view(-1, 4) != 0).sum(1).tolist() == [2] * (layer.weight.numel() // 4)


def test_zeros_belong_to_the_mask_only_as_far_as_the_pattern_removes_them() -> None:
    model = nn.Linear(4, 1)
    model.weight.data.copy_(torch.tensor([[0.0, 0.0, 0.0, 3.0]]))
    with pytest.warns(UserWarning, match=r"`ratio=.*1 .*`weight`.*Masks.from_zeros"):
        masks = magnitude_prune(model, 0.5, pattern="2:4")
    assert masks["weight"].tolist() == [[True, False, False, True]]


def test_what_an_older_mask_removed_does_not_come_back() -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 8)
    before = magnitude_prune(model, 0.75, pattern="1:4")
    with pytest.warns(UserWarning, match="`pattern=.2:4.`.*64.*96"):
        masks = magnitude_prune(model, 0.5, pattern="2:4")
    assert torch.equal(masks["weight"], before["weight"])


def test_a_layer_at_zero_keeps_its_pattern_and_learns() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    nn.init.zeros_(model[2].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="32 .*`2.weight`"):
        masks = magnitude_prune(model, 0.5, pattern="2:4")
    inputs, targets = torch.randn(64, 8), torch.randint(4, (64,))
    with masks.hold(optimizer):
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    assert (masks["2.weight"].view(-1, 4).sum(1) == 2).all()
    assert torch.equal(model[2].weight != 0, masks["2.weight"])


def test_a_layer_that_does_not_fit_is_named_and_left_dense() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Linear(10, 2))
    before = deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=r"0.weight \(3 inputs\), 2.weight \(10 inputs\)") as seen:
        masks = magnitude_prune(model, 0.5, pattern="2:4")
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert list(masks) == ["1.weight"]
    assert torch.equal(model[0].weight, before["0.weight"])
    assert torch.equal(model[2].weight, before["2.weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        magnitude_prune(model, 0.5, pattern="2:4", skip=["0", "2"])


@pytest.mark.parametrize(
    ("ratio", "settings", "message"),
    [
        (0.5, {"pattern": "2-4"}, "`pattern`.*N:M.*'2-4'"),
        (0.5, {"pattern": "4:2"}, "`pattern`.*'4:2'"),
        (0.5, {"pattern": "0:4"}, "`pattern`.*'0:4'"),
        (0.5, {"pattern": (2, 4)}, r"`pattern`.*\(2, 4\)"),
        (0.7, {"pattern": "1:3"}, "`ratio`.*1:3.*0.66.*0.7"),
        (0.745, {"pattern": "1:4"}, "`ratio`.*1:4.*0.75.*0.745"),
        (0.8, {"pattern": "2:4"}, "`ratio`.*2:4.*0.5.*0.8"),
        (0.5, {"pattern": "2:4", "scope": "layer"}, "`pattern` cannot be combined"),
        (0.5, {"pattern": "2:4", "min_kept": 0.1}, "`pattern` cannot be combined"),
        (0.5, {"pattern": "5:10"}, "`pattern`.* weight .8 inputs."),
    ],
)
def test_what_is_no_pattern_is_refused(ratio: float, settings: dict, message: str) -> None:
    model = nn.Linear(8, 3)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=message.replace("weight .8", "weight .8")):
        magnitude_prune(model, ratio, **settings)
    assert torch.equal(model.weight, before)


def test_without_a_gpu_nothing_is_turned() -> None:
    model = nn.Linear(128, 64)
    magnitude_prune(model, 0.5, pattern="2:4")
    weight = model.weight
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"`model`.*8\.0.*cpu"):
            to_semi_structured(model)
    assert model.weight is weight


class Turned(nn.Parameter):
    """Stands in for torch's form, which a CPU does not have."""


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(weight: Tensor) -> Tensor:
        if weight.shape[0] % 32:
            raise RuntimeError("Both dimensions must be larger or equal than and a multiple of 32")
        return weight.clone()

    monkeypatch.setattr(semi_structured, "_capable", lambda device: True)
    monkeypatch.setattr(semi_structured, "_convert", convert)
    monkeypatch.setattr(semi_structured, "_milliseconds", lambda dense, sparse, rows: (2.0, 1.0))


@pytest.mark.usefixtures("accelerated")
def test_what_is_turned_and_what_is_named() -> None:
    model = nn.Sequential(
        nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10), nn.MultiheadAttention(64, 2)
    )
    magnitude_prune(model, 0.5, pattern="2:4", skip=["1"])
    before = dict(model.named_parameters())
    with pytest.warns(UserWarning, match=r"1.weight \(not 2:4\), 2.weight \(Both dim") as seen:
        assert to_semi_structured(model) == ("0.weight",)
    assert len(seen) == 1
    for name, parameter in model.named_parameters():
        assert (parameter is before[name]) == (name != "0.weight")
    assert not model[0].weight.requires_grad


@pytest.mark.usefixtures("accelerated")
def test_nothing_to_turn_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(6, 64))
    with pytest.raises(ValueError, match=r"`model`.*0.weight .not 2:4., 1.weight .not 2:4."):
        to_semi_structured(model)
    with pytest.raises(ValueError, match="`model`.*none"):
        to_semi_structured(nn.ReLU())


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("gain", [False, True])
def test_what_is_not_faster_stays_dense_and_is_named(
    gain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(32, 64))
    magnitude_prune(model, 0.5, pattern="2:4")
    measured = []

    def times(dense: Tensor, sparse: Tensor, rows: int) -> tuple[float, float]:
        measured.append(rows)
        return (2.0, 1.5) if gain and dense.shape[1] == 64 else (1.25, 1.25)

    monkeypatch.setattr(semi_structured, "_milliseconds", times)
    before = dict(model.named_parameters())
    with pytest.warns(UserWarning, match=r"1.weight \(dense 1.25 ms, 2:4 1.25 ms\)"):
        assert to_semi_structured(model, rows=77) == (("0.weight",) if gain else ())
    assert measured == [77, 77]
    assert (model[0].weight is before["0.weight"]) == (not gain)
    assert model[1].weight is before["1.weight"]


def test_rows_are_checked() -> None:
    with pytest.raises(ValueError, match="`rows`.* 0"):
        to_semi_structured(nn.Linear(64, 64), rows=0)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*SparseSemiStructuredTensor", "ignore:.*torch.jit")
def test_on_a_gpu_the_turned_network_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU does not compute 2:4 faster")
    real = semi_structured._milliseconds

    def times(dense: Tensor, sparse: Tensor, rows: int) -> tuple[float, float]:
        assert all(found > 0 for found in real(dense, sparse, rows))
        return 2.0, 1.0  # small layers gain nothing

    monkeypatch.setattr(semi_structured, "_milliseconds", times)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 128)).cuda().half()
    magnitude_prune(model, 0.5, pattern="2:4")
    inputs = torch.randn(64, 256, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        expected = model(inputs)
        assert to_semi_structured(model) == ("0.weight", "2.weight")
        torch.testing.assert_close(model(inputs), expected, rtol=1e-2, atol=1e-2)
