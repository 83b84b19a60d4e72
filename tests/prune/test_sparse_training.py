"""Holding is training the sparse network: the weights are those of `torch.nn.utils.prune`.

There the forward pass multiplies by the masks, so that all else sees the sparse network only.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, prune

from drophot import Masks, magnitude_prune
from drophot.prune import Schedule

LAYERS = (0, 2, 4)
STEPS = 6
Make = Callable[[list[nn.Parameter]], Any]


def data() -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(1)
    inputs = torch.randn(64, 12, generator=chance)
    return inputs, torch.randint(3, (64,), generator=chance)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3)
    )


class Trained:
    """A network at 30 % density, trained by one of three ways."""

    def __init__(self, make: Make, way: str) -> None:
        self.model = network()
        if way == "schedule":
            self.schedule = Schedule(self.model, [0.7], every=1)
            self.masks = self.schedule.masks
        else:
            self.masks = magnitude_prune(self.model, 0.7)
        weights = [f"{i}.weight" for i in LAYERS]
        if way == "torch":
            for i in LAYERS:
                prune.custom_from_mask(self.model[i], "weight", self.masks[f"{i}.weight"])
            weights = [f"{name}_orig" for name in weights]
        names = [n for i, w in zip(LAYERS, weights, strict=True) for n in (w, f"{i}.bias")]
        self.parameters = [self.model.get_parameter(name) for name in names]
        self.optimizer = make(self.parameters)
        if way == "schedule":
            self.schedule.hold(self.optimizer)
        elif way == "hold":
            self.masks.hold(self.optimizer)

    def loss(self) -> Tensor:
        inputs, targets = data()
        return cross_entropy(self.model(inputs), targets)

    def weights(self) -> list[Tensor]:
        """What the network computes with: for torch's way the last forward pass has it."""
        self.model(data()[0])
        return [
            t.detach().clone() for i in LAYERS for t in (self.model[i].weight, self.model[i].bias)
        ]


def backward(run: Trained) -> Tensor:
    run.optimizer.zero_grad()
    loss = run.loss()
    loss.backward()
    return loss


def plainly(run: Trained) -> None:
    for _ in range(STEPS):
        backward(run)
        run.optimizer.step()


def clipped(run: Trained, clip: Callable[[Iterable[Tensor]], Any]) -> None:
    for _ in range(STEPS):
        backward(run)
        clip(run.parameters)
        run.optimizer.step()


def with_closure(run: Trained) -> None:
    for _ in range(STEPS):
        run.optimizer.step(lambda: backward(run))


def assert_equal(make: Make, train: Callable[[Trained], None], way: str = "hold") -> None:
    ours, theirs = Trained(make, way), Trained(make, "torch")
    start = theirs.weights()
    train(theirs)
    train(ours)
    for layer, mask in enumerate(ours.masks.values()):
        assert (ours.model[LAYERS[layer]].weight[~mask] == 0).all()
    expected = theirs.weights()
    assert not torch.equal(expected[0], start[0]), "it learned"
    for one, other in zip(ours.weights(), expected, strict=True):
        assert torch.equal(one, other)


OPTIMIZERS: dict[str, Make] = {
    "SGD": partial(optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "Adam": partial(optim.Adam, lr=0.01, amsgrad=True),
    "AdamW": partial(optim.AdamW, lr=0.01, weight_decay=0.1),
    "AdamW, fused": partial(optim.AdamW, lr=0.01, fused=True),
    "AdamW, foreach": partial(optim.AdamW, lr=0.01, foreach=True),
    "Adamax": partial(optim.Adamax, lr=0.01),
    "NAdam": partial(optim.NAdam, lr=0.01),
    "RAdam": partial(optim.RAdam, lr=0.01),
    "RMSprop": partial(optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
    "Rprop": partial(optim.Rprop, lr=0.01),
    "Adagrad": partial(optim.Adagrad, lr=0.01),
    "Adadelta": partial(optim.Adadelta, lr=1.0),
    "ASGD": partial(optim.ASGD, lr=0.1, t0=2),
    "Adafactor": partial(optim.Adafactor, lr=0.05),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch(name: str) -> None:
    assert_equal(OPTIMIZERS[name], plainly)


@pytest.mark.skipif(not hasattr(optim, "Muon"), reason="newer than torch 2.6")
def test_muon() -> None:
    # It takes matrices only.
    assert_equal(lambda ps: optim.Muon([p for p in ps if p.dim() == 2], lr=0.02), plainly)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs(search: str | None) -> None:
    assert_equal(partial(optim.LBFGS, lr=0.5, line_search_fn=search), with_closure)


CLIPS = {
    "norm": lambda ps: clip_grad_norm_(ps, 0.05),
    "norm, infinite": lambda ps: clip_grad_norm_(ps, 0.05, float("inf")),
    "value": lambda ps: clip_grad_value_(ps, 0.01),
}


@pytest.mark.parametrize("way", ["hold", "schedule"])
@pytest.mark.parametrize("clip", CLIPS)
def test_clipping(clip: str, way: str) -> None:
    assert_equal(OPTIMIZERS["SGD"], partial(clipped, clip=CLIPS[clip]), way)


class SAM(optim.Optimizer):
    """Foret et al. 2021, with another optimiser for its second step, as it is often written."""

    def __init__(self, params: list[nn.Parameter], **settings: Any) -> None:
        super().__init__(params, {"rho": 0.5})
        self.base = optim.SGD(self.param_groups, **settings)

    @torch.no_grad()
    def first_step(self) -> None:
        ps = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in ps]).norm()
        for p in ps:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=0.5 / float(norm))

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"])
        self.base.step()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


def in_two_steps(run: Trained) -> None:
    for _ in range(STEPS):
        backward(run)
        run.optimizer.first_step()
        backward(run)
        run.optimizer.second_step()


def in_one_step(run: Trained) -> None:
    for _ in range(STEPS):
        backward(run)
        run.optimizer.step(lambda: backward(run))


@pytest.mark.parametrize("train", [in_two_steps, in_one_step])
def test_sam(train: Callable[[Trained], None]) -> None:
    assert_equal(partial(SAM, lr=0.1, momentum=0.9, weight_decay=0.01), train)


@pytest.mark.parametrize("train", [in_two_steps, in_one_step])
def test_a_schedule_counts_an_iteration_of_sam_once(train: Callable[[Trained], None]) -> None:
    run = Trained(partial(SAM, lr=0.1), "schedule")
    train(run)
    assert run.schedule.steps == STEPS


def test_a_scaler_does_not_see_the_gradients_of_removed_weights() -> None:
    def train(run: Trained) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        for number in range(STEPS):
            run.optimizer.zero_grad()
            loss = run.loss() * (1e36 if number == 2 else 1)  # this one overflows
            scaler.scale(loss).backward()
            scaler.unscale_(run.optimizer)
            clip_grad_norm_(run.parameters, 0.05)
            scaler.step(run.optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**15

    assert_equal(OPTIMIZERS["AdamW"], train)


def test_gradients_by_autograd_grad_and_those_that_are_differentiated() -> None:
    def train(run: Trained) -> None:
        for _ in range(STEPS):
            found = torch.autograd.grad(run.loss(), run.parameters, create_graph=True)
            penalty = sum((gradient**2).sum() for gradient in found)
            (run.loss() + penalty).backward()
            clip_grad_norm_(run.parameters, 0.05)
            run.optimizer.step()
            run.optimizer.zero_grad()

    assert_equal(OPTIMIZERS["SGD"], train)


def test_gradients_that_add_up() -> None:
    def train(run: Trained) -> None:
        for _ in range(STEPS):
            run.optimizer.zero_grad()
            for _ in range(3):
                run.loss().backward()
            clip_grad_norm_(run.parameters, 0.05)
            run.optimizer.step()

    assert_equal(OPTIMIZERS["AdamW"], train)


def test_gradients_that_torch_negates_later() -> None:
    negative = torch.complex(torch.ones(20, 12), torch.ones(20, 12)).conj().imag
    assert negative.is_neg()

    def train(run: Trained) -> None:
        weight = run.parameters[0]
        for by_hand in (False, True, False):
            if by_hand:
                weight.grad = negative
            else:
                (weight + 0).backward(negative)
            run.optimizer.step()
            run.optimizer.zero_grad()

    assert_equal(OPTIMIZERS["SGD"], train)


# --- optimisers of other libraries ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_schedule_free(name: str) -> None:
    free = pytest.importorskip("schedulefree")

    def train(run: Trained) -> None:
        for _ in range(3):
            run.optimizer.train()
            clipped(run, CLIPS["norm"])
            run.optimizer.eval()  # what is evaluated and saved

    assert_equal(partial(getattr(free, name), lr=0.1), train)


def test_schedule_free_around_another_optimizer() -> None:
    free = pytest.importorskip("schedulefree")

    def train(run: Trained) -> None:
        run.optimizer.train()
        plainly(run)
        run.optimizer.eval()

    assert_equal(lambda ps: free.ScheduleFreeWrapper(optim.SGD(ps, lr=0.1)), train)


def test_transformers_adafactor() -> None:
    library = pytest.importorskip("transformers.optimization")
    assert_equal(library.Adafactor, plainly)


@pytest.mark.parametrize(
    "name",
    ["Lamb", "Lion", "Lars", "Shampoo", "SOAP", "AdaBelief", "Adan", "CAME", "SM3", "Prodigy"],
)
def test_pytorch_optimizer(name: str) -> None:
    library = pytest.importorskip("pytorch_optimizer")
    kind = {each.lower(): getattr(library, each) for each in dir(library)}[name.lower()]
    assert_equal(partial(kind, lr=0.01), partial(clipped, clip=CLIPS["norm"]))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_hessians_of_pytorch_optimizer() -> None:
    library = pytest.importorskip("pytorch_optimizer")

    def train(run: Trained) -> None:
        for _ in range(STEPS):
            run.optimizer.zero_grad()
            run.loss().backward(create_graph=True)
            torch.manual_seed(0)
            run.optimizer.step()

    assert_equal(partial(library.AdaHessian, lr=0.01), train)


def test_weights_made_of_what_is_remembered_are_sparse_too() -> None:
    """SPlus gives the average of its weights, whose steps are not zero where gradients are."""
    library = pytest.importorskip("pytorch_optimizer")

    def train(run: Trained) -> None:
        run.optimizer.train()
        plainly(run)
        run.optimizer.eval()

    assert_equal(partial(library.SPlus, lr=0.01), train)


# --- what is remembered of dense training --------------------------------------------------------


def dense_then(make: Make, hold: bool) -> tuple[nn.Sequential, Masks, Any]:
    model = network()
    optimizer = make(list(model.parameters()))
    inputs, targets = data()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    masks = magnitude_prune(model, 0.7)
    if hold:
        masks.hold(optimizer)
    return model, masks, optimizer


DENSE = {name: OPTIMIZERS[name] for name in ("SGD", "Adam", "RMSprop", "Rprop", "ASGD")}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("loaded", [False, True])
def test_the_state_of_removed_weights_is_zero(name: str, loaded: bool) -> None:
    dense, _, before = dense_then(DENSE[name], hold=False)
    model, masks, optimizer = dense_then(DENSE[name], hold=True)
    if loaded:
        optimizer.load_state_dict(before.state_dict())
    seen = 0
    for path, mask in masks.items():
        state, old = (
            optimizer.state[model.get_parameter(path)],
            before.state[dense.get_parameter(path)],
        )
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == mask.shape:
                seen += 1
                assert torch.equal(value[mask], old[key][mask]), "what is kept is remembered"
                assert (value[~mask] == 0).all()
    assert seen


def test_the_curvature_of_dense_training_is_forgotten_and_that_of_sparse_training_is_not() -> None:
    make = partial(optim.LBFGS, lr=0.5)
    model, masks, optimizer = dense_then(make, hold=True)
    fresh = network()
    fresh.load_state_dict(model.state_dict())
    new = make(list(fresh.parameters()))
    masks.hold(new, model=fresh)
    inputs, targets = data()
    for network_, each in ((model, optimizer), (fresh, new)):
        for _ in range(3):

            def closure(network_: nn.Module = network_, each: Any = each) -> Tensor:
                each.zero_grad()
                loss = cross_entropy(network_(inputs), targets)
                loss.backward()
                return loss

            each.step(closure)
    for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)
    length = len(new.state_dict()["state"][0]["old_dirs"])
    new.load_state_dict(new.state_dict())
    assert len(new.state_dict()["state"][0]["old_dirs"]) == length > 0
