"""Pruning in several steps, and going back to other weights."""

from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from drophot.prune import Masks, Schedule, cubic, geometric, magnitude_prune, rewind

ratios = st.floats(0, 0.99)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    inputs = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 10, generator=inputs)).square().mean().backward()
        optimizer.step()


@given(ratios, st.integers(1, 20))
def test_the_cubic_ratios_are_zhu_and_guptas(ratio: float, times: int) -> None:
    found = cubic(ratio, times)
    # s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3, dense at first
    expected = [ratio + (0 - ratio) * (1 - t / times) ** 3 for t in range(1, times + 1)]
    assert found == pytest.approx(expected)
    assert found[-1] == ratio
    assert list(found) == sorted(found)


@given(ratios, st.integers(1, 20))
def test_each_round_removes_the_same_share_of_what_is_left(ratio: float, times: int) -> None:
    found = geometric(ratio, times)
    left = [1.0] + [1 - share for share in found]
    shares = [1 - after / before for before, after in pairwise(left)]
    assert shares == pytest.approx([1 - (1 - ratio) ** (1 / times)] * times)
    assert found[-1] == ratio


@pytest.mark.parametrize("function", [cubic, geometric])
def test_ratios_that_make_no_sense_are_refused(function) -> None:
    for ratio, times, error, message in (
        (1.0, 3, ValueError, "`ratio` .*1.0"),
        ("x", 3, TypeError, "`ratio` .*x"),
        (0.5, 3.0, TypeError, "`times` .*3.0.*3"),
        (0.5, True, TypeError, "`times` .*True"),
        (0.5, 0, ValueError, "`times` .*0"),
    ):
        with pytest.raises(error, match=message):
            function(ratio, times)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_one_ratio_is_one_shot_held(optimizer: type[torch.optim.Optimizer]) -> None:
    model, other = network(), network()
    one, two = optimizer(model.parameters(), lr=0.1), optimizer(other.parameters(), lr=0.1)
    with magnitude_prune(model, 0.7).hold(one):
        train(model, one, 7)
    with Schedule(other, [0.7], every=2).hold(two):
        train(other, two, 7)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


@given(
    st.lists(ratios, min_size=1, max_size=4).map(sorted),
    st.integers(1, 4),
    st.sampled_from(["global", "layer", "erk", "lamp"]),
)
def test_it_prunes_when_it_is_due_and_exactly(shares: list[float], every: int, scope: str) -> None:
    model = network()
    total = 280
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = Schedule(model, shares, every=every, scope=scope)
    sizes = [200, 80] if scope == "layer" else [total]
    for step in range(1, every * len(shares) + 3):
        train(model, optimizer, 1, seed=step)
        before = {name: mask.clone() for name, mask in schedule.masks.items()}
        due = step % every == 0 and step // every < len(shares)
        assert schedule.step() == due
        ratio = shares[min(step // every, len(shares) - 1)]
        assert schedule.ratio == ratio
        expected = sum(int(ratio * size + 0.5) for size in sizes)
        zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)
        assert zeros == expected
        assert all(not (mask & ~before[name]).any() for name, mask in schedule.masks.items())
        assert schedule.finished == (step >= every * (len(shares) - 1))


def test_any_loop_with_one_call_a_step() -> None:
    model, other = network(), network()
    one = torch.optim.AdamW(model.parameters(), lr=0.05)
    two = torch.optim.AdamW(other.parameters(), lr=0.05)
    schedule = Schedule(model, cubic(0.8, 3), every=4)
    for number in range(15):
        train(model, one, 1, seed=number)
        schedule.step()
    held = Schedule(other, cubic(0.8, 3), every=4)
    with held.hold(two):
        for number in range(15):
            train(other, two, 1, seed=number)
    train(other, two, 1, seed=99)  # let go: weights come back
    assert schedule.masks.sparsity == held.masks.sparsity == 0.8
    assert Masks.from_zeros(model).sparsity == 0.8
    assert Masks.from_zeros(other).sparsity < 0.8


def test_it_goes_on_where_it_was(tmp_path) -> None:
    def run(steps: range, model: nn.Module, schedule: Schedule, optimizer) -> None:
        for number in steps:
            train(model, optimizer, 1, seed=number)
            schedule.step()

    whole, half = network(), network()
    settings = {"every": 3, "scope": "layer"}
    one = torch.optim.SGD(whole.parameters(), lr=0.1, momentum=0.9)
    run(range(12), whole, Schedule(whole, geometric(0.9, 4), **settings), one)
    two = torch.optim.SGD(half.parameters(), lr=0.1, momentum=0.9)
    schedule = Schedule(half, geometric(0.9, 4), **settings)
    run(range(5), half, schedule, two)
    states = [half.state_dict(), two.state_dict(), schedule.state_dict()]
    torch.save(states, tmp_path / "half.pt")
    states = torch.load(tmp_path / "half.pt")

    rest = network()
    three = torch.optim.SGD(rest.parameters(), lr=0.1, momentum=0.9)
    again = Schedule(rest, geometric(0.9, 4), **settings)
    for thing, state in zip((rest, three, again), states, strict=True):
        thing.load_state_dict(state)
    assert again.ratio == schedule.ratio
    run(range(5, 12), rest, again, three)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": [0.8]}, r"ratios=\[0.5, 0.75\].*\[0.8\]"),
        ({"every": 7}, "every=3.*7"),
        ({"scope": "lamp"}, "scope=global.*lamp"),
        ({"min_kept": 0.1}, "min_kept=0.0.*0.1"),
        ({"skip": ["0"]}, r"skip=\[\].*\['0'\]"),
        ({"steps": -3}, r"steps.* .*-3"),
        ({"steps": None}, "no 'steps'"),
        ({"scope": None}, "no 'scope'"),
        ({"masks": {}}, "masks"),
    ],
)
def test_the_state_of_another_schedule_is_refused_and_changes_nothing(change, message) -> None:
    model = network()
    schedule = Schedule(model, [0.5, 0.75], every=3)
    schedule.step()
    before, masks = deepcopy(model.state_dict()), deepcopy(schedule.masks)
    state = {**Schedule(network(), [0.5, 0.75], every=3).state_dict(), **change}
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        schedule.load_state_dict(state)
    assert schedule.steps == 1
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    assert all(torch.equal(mask, masks[name]) for name, mask in schedule.masks.items())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"ratios": []}, ValueError, "`ratios` must contain at least one"),
        ({"ratios": [0.5, 0.4]}, ValueError, "`ratios`.*0.4 after 0.5"),
        ({"ratios": [0.5, 1.0]}, ValueError, r"`ratios\[1\]` .*1.0"),
        ({"ratios": ["a"]}, TypeError, r"`ratios\[0\]` .*'a'"),
        ({"every": 0}, ValueError, "`every` .*0"),
        ({"every": 2.0}, TypeError, "`every` .*2.0.*2"),
        ({"every": 31 / 2}, TypeError, "`every` .*15.5"),
        ({"every": "3"}, TypeError, "`every` .*'3'.*3"),
        (
            {"ratios": 0.5},
            TypeError,
            "`ratios`.*0.5.*ass .0.5.",
        ),
        ({"ratios": "0.5"}, TypeError, "`ratios`.*'0.5'"),
        ({"min_kept": "0.1"}, TypeError, "`min_kept` .*0.1"),
        ({"scope": "all"}, ValueError, "`scope`.*all"),
        ({"skip": ["9"]}, ValueError, "`skip`.*'9'"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(
    settings: dict, error: type, message: str
) -> None:
    model = network()
    before = deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        Schedule(model, **{"ratios": [0.5], "every": 1, **settings})
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_an_optimiser_of_another_model_is_refused() -> None:
    schedule = Schedule(network(), [0.5], every=1)
    with pytest.raises(ValueError, match="`optimizer`.*pruned"):
        schedule.hold(torch.optim.SGD(network().parameters(), lr=1.0))
    with pytest.raises(TypeError, match="`optimizer`.*str"):
        schedule.hold("sgd")


def test_masks_follow_the_model_to_another_dtype() -> None:
    model = network()
    schedule = Schedule(model, [0.5], every=1)
    schedule.step()
    model.to(torch.float64)
    model[0].weight.data.fill_(1.0)
    schedule.step()
    assert int((model[0].weight == 0).sum()) == int((~schedule.masks["0.weight"]).sum()) > 0
    # Not by a factor of another dtype, which torch would multiply by one tensor at a time.
    known = schedule.masks._bit_masks._cache.values()
    assert known
    assert all(factor.dtype == torch.int64 for factor, *_ in known)


def test_rewinding_gives_the_old_weights_under_the_masks() -> None:
    model = network()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, 20)
    masks = magnitude_prune(model, 0.6)
    rewind(model, masks, start)
    for name, tensor in model.state_dict().items():
        expected: Tensor = start[name] * masks[name] if name in masks else start[name]
        assert torch.equal(tensor, expected)
    assert masks.sparsity == 0.6


@pytest.mark.parametrize("change", ["missing", "strange", "shape"])
def test_weights_of_another_model_are_refused(change: str) -> None:
    model = network()
    masks = magnitude_prune(model, 0.6)
    state = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    before = deepcopy(model.state_dict())
    if change == "missing":
        del state["2.bias"]
    elif change == "strange":
        state["3.bias"] = torch.ones(1)
    else:
        state["2.bias"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"`state_dict`.*\['[23].bias"):
        rewind(model, masks, state)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_a_pruning_that_failed_is_still_due() -> None:
    model = network()
    schedule = Schedule(model, [0.2, 0.6], every=1)
    kept = tuple(schedule.masks["0.weight"].nonzero()[0].tolist())
    model[0].weight.data[kept] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        schedule.step()
    assert (schedule.ratio, schedule.steps) == (0.2, 0)
    model[0].weight.data[kept] = 1.0
    assert schedule.step()
    assert Masks.from_zeros(model).sparsity == 0.6


def test_the_models_own_state_is_no_earlier_one() -> None:
    model = network()
    masks = magnitude_prune(model, 0.5)
    with pytest.raises(ValueError, match="`state_dict`.*`0.weight`"):
        rewind(model, masks, model.state_dict())


class WithHead(nn.Module):
    """Its head starts at zero, as that of a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(10, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU())
        self.head = nn.Linear(20, 4)
        nn.init.zeros_(self.head.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))


def learn(model: nn.Module, schedule: Schedule, steps: int) -> float:
    """The loss after training on labels that are there to be learned."""
    chance = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 10, generator=chance)
    targets = (inputs[:, :4]).argmax(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


@pytest.mark.filterwarnings("ignore:.*Masks.from_zeros")
@pytest.mark.parametrize("scope", ["global", "layer", "erk", "lamp"])
@pytest.mark.parametrize("ratios", [cubic(0.5, 5), (0.0, 0.3, 0.5)])
def test_a_head_that_starts_at_zero_learns(ratios: tuple[float, ...], scope: str) -> None:
    model = WithHead()
    schedule = Schedule(model, ratios, every=10, scope=scope)
    assert schedule.masks["head.weight"].any(1).all()
    assert learn(model, schedule, 100) < 0.3
    assert schedule.masks["head.weight"].sum() >= 40  # of 80
    for name, mask in schedule.masks.items():
        assert not model.get_parameter(name)[~mask].any()
    assert schedule.masks.sparsity == pytest.approx(0.5, abs=1e-3)


def test_a_head_that_starts_at_zero_is_named() -> None:
    with pytest.warns(UserWarning, match=r"`head.weight` \(80 weights\).*from_zeros") as seen:
        schedule = Schedule(WithHead(), cubic(0.5, 5), every=10)
    assert [warning.filename for warning in seen] == [__file__]
    total = 10 * 40 + 40 * 20 + 80
    assert schedule.masks.sparsity == int(cubic(0.5, 5)[0] * total + 0.5) / total
    with pytest.warns(UserWarning, match="80 .*`head.weight`.*from_zeros"):
        assert Schedule(WithHead(), [0.0, 0.5], every=10).masks.sparsity == 0


@pytest.mark.filterwarnings("ignore:.*Masks.from_zeros")
def test_it_remembers_what_started_at_zero_when_it_is_resumed(tmp_path) -> None:
    def schedule(model: nn.Module) -> Schedule:
        return Schedule(model, [0.2, 0.4, 0.6], every=3)

    model = WithHead()
    one = schedule(model)
    learn(model, one, 4)
    states = deepcopy((model.state_dict(), one.state_dict()))
    other = WithHead()
    nn.init.ones_(other.head.weight)  # as if it had not been
    two = schedule(other)
    for thing, state in zip((other, two), states, strict=True):
        thing.load_state_dict(state)
    learn(model, one, 4)
    learn(other, two, 4)
    assert all(torch.equal(mask, two.masks[name]) for name, mask in one.masks.items())
    assert int((~two.masks["head.weight"]).sum()) <= 0.6 * 80


def test_numbers_of_numpy_are_plain_in_the_state(tmp_path) -> None:
    model = network()
    ratios = np.linspace(0.1, 0.7, 4)
    schedule = Schedule(model, ratios, every=np.int64(2), min_kept=np.float32(0.25))
    torch.save(schedule.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    assert state["ratios"] == ratios.tolist()
    assert (type(state["every"]), type(state["min_kept"])) == (int, float)
    again = Schedule(network(), (ratio for ratio in ratios), every=2, min_kept=0.25)
    again.load_state_dict(state)
    assert again.steps == 0


def test_a_layer_that_was_emptied_stays_empty() -> None:
    """Its zeros are there because of an older mask, unlike those that a layer starts with."""
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    schedule = Schedule(model, [0.3, 0.6, 0.9], every=1)
    assert not schedule.masks["2.weight"].any()
    for number in range(3):
        train(model, optimizer, 1, seed=number)
        schedule.step()
        assert not schedule.masks["2.weight"].any()
    assert schedule.masks.sparsity == 0.9
    # In a copy, that knows of no pruning, the masks tell.
    other = deepcopy(model)
    masks = Masks.from_zeros(other)
    masks.apply()
    assert magnitude_prune(other, 0.95).sparsity == 0.95
    assert not other[2].weight.any()


# --- mistakes that would show late, or not at all -------------------------------------------------


def test_steps_that_a_hold_counts_are_not_counted_twice() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = Schedule(model, [0.25, 0.5], every=3)
    with schedule.hold(optimizer):
        train(model, optimizer, 1)
        with pytest.raises(RuntimeError, match=r"`step` .*counted already"):
            schedule.step()
    assert schedule.steps == 1
    schedule.step()  # once it is held no longer
    assert schedule.steps == 2


@pytest.mark.parametrize("scope", ["global", "lamp"])
def test_a_minimum_that_the_last_ratio_cannot_leave_is_refused_at_once(scope) -> None:
    model = network()
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="`min_kept`"):
        Schedule(model, [0.2, 0.8], every=1, scope=scope, min_kept=0.25)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    schedule = Schedule(model, [0.2, 0.75], every=1, scope=scope, min_kept=0.25)
    assert schedule.step()
    assert schedule.masks.sparsity == 0.75


def test_resuming_with_weights_that_were_loaded_too_early_is_refused() -> None:
    """A layer that was emptied looks like one that starts at zero, so that others are pruned."""

    def schedule_of(model: nn.Module) -> Schedule:
        return Schedule(model, [0.3, 0.5], every=1)

    model = network()
    model[2].weight.data.mul_(1e-6)
    schedule = schedule_of(model)
    schedule.step()
    assert not schedule.masks["2.weight"].any()
    saved, state = deepcopy(model.state_dict()), schedule.state_dict()

    early = network()
    early.load_state_dict(saved)
    with pytest.warns(UserWarning, match="`2.weight`"):
        again = schedule_of(early)
    with pytest.raises(ValueError, match=r"`2\.weight`.*Schedule first"):
        again.load_state_dict(state)
    assert again.steps == 0

    right = network()
    again = schedule_of(right)
    right.load_state_dict(saved)
    again.load_state_dict(state)
    assert torch.equal(right[0].weight, model[0].weight)
    assert again.masks == schedule.masks


@pytest.mark.parametrize("value", [None, [], "masks.pt", nn.Linear(2, 2)], ids=repr)
def test_what_is_no_state_is_refused(value) -> None:
    model = network()
    masks, schedule = magnitude_prune(model, 0.5), Schedule(network(), [0.5], every=1)
    for load in (
        masks.load_state_dict,
        schedule.load_state_dict,
        lambda state: rewind(model, masks, state),
    ):
        with pytest.raises(TypeError, match="`state_dict`"):
            load(value)
    with pytest.raises(TypeError, match=r'`state_dict\["masks"\]`'):
        schedule.load_state_dict(schedule.state_dict() | {"masks": value})
    with pytest.raises(TypeError, match=r'`state_dict\["2\.weight"\]`.*list'):
        masks.load_state_dict(masks.state_dict() | {"2.weight": [True]})
    with pytest.raises(TypeError, match="`masks`"):
        rewind(model, value, model.state_dict())
