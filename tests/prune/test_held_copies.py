"""Copies, wrappers and replacements of what is held: they hold, or they are an error."""

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR

from drophot import Masks, magnitude_prune
from drophot.prune import Schedule


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))


def inputs() -> Tensor:
    return torch.randn(32, 16, generator=torch.Generator().manual_seed(1))


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(inputs()).square().mean().backward()


def train(model: nn.Module, optimizer: Any, steps: int = 3) -> None:
    for _ in range(steps):
        backward(model)
        optimizer.step()


def sparsity(model: nn.Module) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return round(Masks.from_zeros(model).sparsity, 3)


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def held() -> tuple[nn.Sequential, Optimizer, Masks, Any]:
    model = network()
    optimizer = AdamW(model.parameters(), lr=0.05)
    masks = magnitude_prune(model, 0.75)
    return model, optimizer, masks, masks.hold(optimizer)


def saved(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": saved,
    "a copy of a copy": lambda pair: pickle.loads(pickle.dumps(copy.deepcopy(pair))),
    "the optimizer first": lambda pair: copy.deepcopy(pair[::-1])[::-1],
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("begun", [False, True])
def test_a_copy_of_model_and_optimizer_is_held_and_trains_alike(way: str, begun: bool) -> None:
    model, optimizer, masks, _ = held()
    train(model, optimizer, 2 * begun)
    twin, other = COPIES[way]((model, optimizer))
    other.register_step_post_hook(lambda *_: None)  # whose number is its own
    backward(twin)
    for name, mask in masks.items():
        assert (gradient(twin.get_parameter(name))[~mask] == 0).all(), "before any step"
    train(twin, other)
    assert sparsity(twin) == 0.75
    train(model, optimizer)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_free_once_the_handle_is_removed(way: str) -> None:
    model, optimizer, _, handle = held()
    handle.remove()
    twin, other = COPIES[way]((model, optimizer))
    train(twin, other)
    assert sparsity(twin) == 0
    assert not any("getstate" in name for name in vars(optimizer))


def test_a_handle_is_copied_too() -> None:
    model, optimizer, _, handle = held()
    twin, other, its = copy.deepcopy((model, optimizer, handle))
    its.remove()
    train(twin, other)
    train(model, optimizer)
    assert (sparsity(twin), sparsity(model)) == (0, 0.75)


@pytest.mark.parametrize("way", [way for way in COPIES if way != "the optimizer first"])
def test_a_copied_schedule_goes_on_where_it_was_and_so_does_the_first(way: str) -> None:
    model = network()
    optimizer = AdamW(model.parameters(), lr=0.05)
    schedule = Schedule(model, [0.25, 0.5, 0.75], every=2)
    schedule.hold(optimizer)
    train(model, optimizer, 1)
    twin, other, its = COPIES[way]((model, optimizer, schedule))
    train(twin, other, 3)
    assert (its.steps, schedule.steps) == (4, 1)
    assert (sparsity(twin), sparsity(model)) == (0.75, 0.25)
    train(model, optimizer, 3)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


class Odd(nn.Module):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.activation = lambda x: x.relu()


def test_masks_of_a_model_that_cannot_be_pickled_can() -> None:
    masks = pickle.loads(pickle.dumps(magnitude_prune(Odd(), 0.5)))
    assert masks.sparsity == 0.5
    with pytest.raises(ValueError, match="`model` must be given"):
        masks.apply()
    other = Odd()
    masks.apply(other)
    assert torch.equal(other.layer.weight != 0, masks["layer.weight"])


@pytest.mark.parametrize("way", COPIES)
def test_a_model_that_has_its_masks(way: str) -> None:
    model = network()
    model.masks = magnitude_prune(model, 0.75)
    twin, _ = COPIES[way]((model, None))
    nn.init.ones_(twin[0].weight)
    twin.masks.apply()
    assert sparsity(twin) == sparsity(model) == 0.75
    assert COPIES[way]((model.masks, None))[0].sparsity == 0.75


def test_nothing_is_kept_alive() -> None:
    model, optimizer, masks, handle = held()
    train(model, optimizer)
    gone = weakref.ref(optimizer)
    del optimizer, handle
    gc.collect()
    assert gone() is None
    train(model, SGD(model.parameters(), lr=0.1))
    assert sparsity(model) == 0, "nothing is left of a hold whose optimizer is gone"
    gone = weakref.ref(model)
    del model, masks
    gc.collect()
    assert gone() is None


# --- wrappers ------------------------------------------------------------------------------------


class Never(Optimizer):
    """An optimiser by its class alone, as accelerate's is."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step(closure)


class Lookahead(Optimizer):
    """Zhang et al. 2019, of two steps."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.inner = [optimizer]
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner[0].step(closure)
        with torch.no_grad():
            ps = [p for group in self.param_groups for p in group["params"]]
            for p, slow in zip(ps, self.slow, strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)


class Plain:
    """No optimiser by its class, with one in it."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    def step(self) -> None:
        self.optimizer.step()


@pytest.mark.parametrize("wrap", [Never, Lookahead, Plain, lambda o: Never(Lookahead(o))])
@pytest.mark.parametrize("scheduled", [False, True])
def test_an_optimizer_in_another_is_held(wrap: Callable[[Any], Any], scheduled: bool) -> None:
    model = network()
    inner = SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, inner)
    optimizer = wrap(inner)  # Lookahead has dense weights in its memory
    schedule = Schedule(model, [0.5, 0.75], every=2)
    with (schedule if scheduled else schedule.masks).hold(optimizer):
        train(model, optimizer, 4)
        assert sparsity(model) == (0.75 if scheduled else 0.5)
    assert schedule.steps == (4 if scheduled else 0)


def test_accelerates_optimizer_is_held() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = network()
    optimizer = AdamW(model.parameters(), lr=0.05)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    schedule = Schedule(model, [0.5, 0.75], every=2)
    with schedule.hold(optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            accelerator.backward(model(inputs()).square().mean())
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        twin, other = copy.deepcopy((model, optimizer.optimizer))
        train(twin, other)
    assert sparsity(model) == sparsity(twin) == 0.75


def test_the_trainers_callbacks_can_hold(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    seen = []

    class Hold(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model, optimizer, **_) -> None:
            self.handle = magnitude_prune(model, 0.5).hold(optimizer)

        def on_train_end(self, args, state, control, model, **_) -> None:
            self.handle.remove()
            seen.append(sparsity(model))

    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    transformers.Trainer(
        transformers.BertForSequenceClassification(config),
        transformers.TrainingArguments(
            str(tmp_path),
            max_steps=3,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": [3, 4, 5], "labels": 1}] * 8,
        callbacks=[Hold()],
    ).train()
    assert seen == [0.5]


def test_what_is_no_optimizer_is_refused() -> None:
    model = network()
    masks = magnitude_prune(model, 0.5)
    masters = SGD([p.detach().clone() for p in model.parameters()], lr=0.1)
    for wrong in (ConstantLR(SGD(model.parameters(), lr=0.1)), Never(None), model, "sgd"):
        for hold in (masks.hold, masks.check, Schedule(network(), [0.5], every=1).hold):
            with pytest.raises(TypeError, match="`optimizer`"):
                hold(wrong)
    with pytest.raises(ValueError, match="`optimizer`.*pruned"):
        masks.hold(Plain(masters))  # as apex's FP16_Optimizer, which copies over what it trains


# --- weights that are changed by something else --------------------------------------------------


def test_parameters_that_are_replaced_while_held_are_an_error_at_the_next_step() -> None:
    model, optimizer, _, _ = held()
    train(model, optimizer)
    model.load_state_dict(network().state_dict(), assign=True)
    backward(model)
    with pytest.raises(RuntimeError, match=r"no longer the model's: `0\.weight`"):
        optimizer.step()


def test_parameters_that_the_optimizer_follows_are_held() -> None:
    model, optimizer, masks, handle = held()
    train(model, optimizer)
    model[0].weight = nn.Parameter(torch.ones(32, 16))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with handle:
        train(model, optimizer)
    assert torch.equal(model[0].weight != 0, masks["0.weight"])


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "by hand": lambda m: m[2].weight.data.add_(1),
    "a dense checkpoint": lambda m: m.load_state_dict(network().state_dict()),
    "replaced": lambda m: m.load_state_dict(network().state_dict(), assign=True),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("scheduled", [False, True])
def test_weights_that_came_back_are_an_error_at_the_end(change: str, scheduled: bool) -> None:
    model = network()
    optimizer = AdamW(model.parameters(), lr=0.05)
    schedule = Schedule(model, [0.75], every=1)
    holder = schedule if scheduled else schedule.masks
    handle = holder.hold(optimizer)
    train(model, optimizer)
    CHANGES[change](model)
    with pytest.raises(RuntimeError, match=r"removed weights are no longer zero .*`2\.weight`"):
        handle.remove()
    handle.remove()  # it has ended


def test_an_error_of_ones_own_is_not_hidden_by_another() -> None:
    model, _, _, handle = held()

    def fail() -> None:
        with handle:
            nn.init.ones_(model[2].weight)
            raise KeyError("one's own")

    with pytest.raises(KeyError, match="one's own"):
        fail()


def test_a_schedule_whose_steps_are_never_taken_is_an_error() -> None:
    class Sneaky(SGD):
        @torch.no_grad()
        def go(self) -> None:
            for p in self.param_groups[0]["params"]:
                p -= 0.1 * gradient(p)

    model = network()
    optimizer = Sneaky(model.parameters(), lr=0.1)
    schedule = Schedule(model, [0.5, 0.75], every=1)
    handle = schedule.hold(optimizer)
    backward(model)
    optimizer.go()
    with pytest.raises(RuntimeError, match="never called"):
        handle.remove()
    with schedule.hold(optimizer):  # nothing was trained
        pass
    with magnitude_prune(model, 0.75).hold(optimizer):  # without a count, zeros are all
        backward(model)
        optimizer.go()
    assert sparsity(model) == 0.75


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_optimizers_of_one_schedule_count_once(order: tuple[int, int]) -> None:
    model = network()
    optimizers = [SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
    schedule = Schedule(model, [0.25, 0.5, 0.75], every=2)
    handles = [schedule.hold(optimizer) for optimizer in optimizers]
    for number in range(1, 6):
        backward(model)
        for i in order:
            optimizers[i].step()
        assert schedule.steps == number
    handles[1].remove()
    schedule.hold(optimizers[0])
    backward(model)
    with pytest.warns(UserWarning, match=r"`2\.weight`"):
        optimizers[0].step()
    assert schedule.steps == 6


def test_masks_that_are_changed_in_place_are_held_as_they_are() -> None:
    model, optimizer, masks, _ = held()
    train(model, optimizer)
    masks["2.weight"].fill_(True)
    masks["0.weight"][:8] = False
    train(model, optimizer)
    assert (model[2].weight != 0).all()
    assert (model[0].weight[:8] == 0).all()
    assert (gradient(model[0].weight)[:8] == 0).all()


# --- gradients -----------------------------------------------------------------------------------


def by_hand(model: nn.Sequential) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)


def expanded(model: nn.Sequential) -> None:
    for p in model.parameters():
        p.grad = torch.ones(()).expand(p.shape)


def noisy(model: nn.Sequential) -> None:
    backward(model)
    for p in model.parameters():
        gradient(p).add_(1)


def noisy_and_added(model: nn.Sequential) -> None:
    noisy(model)
    model(inputs()).square().mean().backward()


@pytest.mark.parametrize("make", [by_hand, expanded, noisy, noisy_and_added])
@pytest.mark.parametrize("before", [False, True])
def test_gradients_that_did_not_come_from_the_backward_pass_are_masked_for_the_step(
    make: Callable[[nn.Sequential], None], before: bool
) -> None:
    model = network()
    optimizer = AdamW(model.parameters(), lr=0.05)
    masks = magnitude_prune(model, 0.75)
    if before:
        make(model)
    masks.hold(optimizer)
    if not before:
        make(model)
    optimizer.step()
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert (gradient(weight)[~mask] == 0).all()
        assert (gradient(weight)[mask] != 0).any()
        assert (optimizer.state[weight]["exp_avg"][~mask] == 0).all()


class Tied(nn.Module):
    """The gradient of its weight is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6, sparse=True)
        self.out = nn.Linear(6, 10, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x).square().sum()


def test_sparse_gradients() -> None:
    torch.manual_seed(0)
    model = Tied()
    masks = magnitude_prune(model, 0.5)
    optimizer = SGD(model.parameters(), lr=0.1)
    with masks.hold(optimizer):
        for _ in range(3):
            model.zero_grad()
            model(torch.tensor([1, 1, 3])).backward()
            gradient = model.embed.weight.grad
            assert gradient.is_sparse
            assert (gradient.to_dense()[~masks["out.weight"]] == 0).all()
            assert gradient.to_dense().any()
            optimizer.step()
    assert sparsity(model) == 0.5


def test_a_layer_that_is_unfrozen_has_masked_gradients_at_once() -> None:
    model = network()
    model[0].requires_grad_(False)
    masks = magnitude_prune(model, 0.75)
    optimizer = SGD(model.parameters(), lr=0.1)
    masks.hold(optimizer)
    assert not model[0].weight.requires_grad
    model[0].requires_grad_(True)
    backward(model)
    assert (gradient(model[0].weight)[~masks["0.weight"]] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_and_a_compiled_step(backend: str) -> None:
    torch._dynamo.reset()
    model, other = network(), network()
    masks = magnitude_prune(model, 0.75)
    twins = [SGD(m.parameters(), lr=torch.tensor(0.1), momentum=0.9) for m in (model, other)]
    masks.apply(other)
    masks.hold(twins[0])
    masks.hold(twins[1], model=other)
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    step: Any = torch.compile(twins[0].step, backend=backend)
    for _ in range(3):
        for network_, advance in ((compiled, step), (other, twins[1].step)):
            backward(network_)
            nn.utils.clip_grad_norm_(network_.parameters(), 0.1)
            advance()
    assert sparsity(model) == 0.75
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)
