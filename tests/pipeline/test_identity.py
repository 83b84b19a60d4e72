"""What a configuration says: other code, settings or data are another experiment, other addresses
are not."""

import abc
import enum
import functools
import importlib
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from os import environ
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam
from torch.utils.data import Dataset, Subset, TensorDataset

from drophot import DropHot, Grid, fit, select
from drophot.records import fingerprint

INPUTS = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
TARGETS = (INPUTS[:, 0] > 0).long()
DATA = TensorDataset(INPUTS, TARGETS)


def net() -> nn.Module:
    return nn.Linear(4, 2)


def drop_hot(**changes: Any) -> DropHot:
    settings: dict[str, Any] = {
        **{"model": net, "train_set": DATA, "test_set": DATA, "device": "cpu"},
        **{"data_ratio": 0.5, "mode": "random", "prune_ratio": 0.5},
        **{"score_epochs": 1, "train_epochs": 1, "finetune_epochs": 1},
    }
    return DropHot(**(settings | changes))


def said(**changes: Any) -> str:
    """The configuration as text."""
    return json.dumps(drop_hot(**changes).configuration, sort_keys=True)


# --- kinds of things that a factory can be made of ------------------------------------------------


class Net(nn.Module):
    """Takes anything; a function that it is given comes last."""

    def __init__(self, **anything: Any) -> None:
        super().__init__()
        self.layer, self.anything = nn.Linear(4, 2), anything

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)


class Make:
    """Makes optimisers, and counts them in several ways."""

    made = 0

    def __init__(self, lr: float) -> None:
        self.lr, self.count, self.log = lr, 0, list[str]()

    def __call__(self, parameters: Any) -> SGD:
        self.count += 1
        self.log.append("made")
        return SGD(parameters, lr=self.lr)

    def make(self, parameters: Any) -> SGD:
        return SGD(parameters, lr=self.lr)


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Plain:
    """As a configuration from a file: no repr of its own."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


class Sort(enum.Enum):
    ONE = 1
    TWO = 2


class Abstract(abc.ABC):
    @abc.abstractmethod
    def make(self) -> None: ...


class Concrete(Abstract):
    def make(self) -> None:
        logging.getLogger("test").info("made")


@dataclass
class Settings:
    width: int = 8
    names: list[str] = field(default_factory=list)


class Pair(NamedTuple):
    one: Any
    two: Any


@functools.cache
def cached(value: int) -> int:
    return value


@torch.no_grad()
def decorated(inputs: Tensor) -> Tensor:
    return inputs * 2


def cyclic() -> list[Any]:
    found: list[Any] = [1]
    found.append(found)
    return found


def compressed(value: float = 1.0) -> Tensor:
    places = torch.tensor([0, 1, 2]), torch.tensor([0, 1])
    with warnings.catch_warnings():  # that it is in beta
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(*places, torch.tensor([value, 1.0]), check_invariants=False)


def quantised(scale: float) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.tensor([1.0, 2.0]), scale, 0, torch.qint8)


# Each gives two values that differ; each is made anew for each call.
VALUES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "function of torch": (lambda: F.relu, lambda: F.gelu),
    "built-in of torch": (lambda: torch.tanh, lambda: torch.sin),
    "method of tensors": (lambda: Tensor.relu, lambda: Tensor.abs),
    "class": (lambda: nn.ReLU, lambda: nn.Identity),
    "module": (lambda: nn.ReLU(), lambda: nn.Sigmoid()),
    "dropout": (lambda: nn.Dropout(0.1), lambda: nn.Dropout(0.2)),
    "lambda": (lambda: lambda x: x + 1, lambda: lambda x: x + 2),
    "name in a lambda": (lambda: lambda x: x.sin(), lambda: lambda x: x.cos()),
    "lambda within": (
        lambda: lambda x: (lambda y: y + 1)(x),
        lambda: lambda x: (lambda y: y + 2)(x),
    ),
    "default": (lambda: lambda x, a=1: x, lambda: lambda x, a=2: x),
    "keyword default": (lambda: lambda x, *, a=1: x, lambda: lambda x, *, a=2: x),
    "partial within": (lambda: partial(F.elu, alpha=1.0), lambda: partial(F.elu, alpha=2.0)),
    "decorated": (lambda: decorated, lambda: torch.no_grad()(lambda inputs: inputs * 3)),
    "cached": (lambda: cached, lambda: functools.cache(lambda value: value + 1)),
    "object": (lambda: Plain(a=1), lambda: Plain(a=2)),
    "object within": (lambda: Plain(a=Plain(b=1)), lambda: Plain(a=Plain(b=2))),
    "slots": (lambda: Slotted(1), lambda: Slotted(2)),
    "bound method": (lambda: Make(0.1).make, lambda: Make(0.2).make),
    "dataclass": (lambda: Settings(8, ["a"]), lambda: Settings(8, ["b"])),
    "named tuple": (lambda: Pair(1, 2), lambda: Pair(1, 3)),
    "enum": (lambda: Sort.ONE, lambda: Sort.TWO),
    "abstract class": (lambda: Concrete, lambda: Abstract),
    "namespace": (lambda: Namespace(a=1), lambda: Namespace(a=2)),
    "set": (lambda: {f"conv{i}" for i in range(9)}, lambda: {f"conv{i}" for i in range(8)}),
    "set in a tuple": (lambda: (frozenset("abcdef"),), lambda: (frozenset("abcde"),)),
    "dict of any keys": (lambda: {1: 2, None: 3, "a": {4}}, lambda: {1: 2, None: 3, "a": {5}}),
    "list in itself": (cyclic, lambda: [1, [1, cyclic()]]),
    "device": (lambda: torch.device("cpu"), lambda: torch.device("cuda")),
    "dtype": (lambda: torch.float32, lambda: torch.float64),
    "generator": (lambda: torch.Generator(), lambda: torch.Generator().manual_seed(1)),
    "long tensor": (
        lambda: torch.zeros(2000),
        lambda: torch.zeros(2000).index_fill(0, torch.tensor([900]), 1.0),
    ),
    "long array": (lambda: torch.zeros(2000).numpy(), lambda: torch.ones(2000).numpy()),
    "long list": (lambda: list(range(5000)), lambda: [*range(4999), 0]),
    "sparse tensor": (lambda: torch.eye(3).to_sparse(), lambda: (torch.eye(3) * 2).to_sparse()),
    "compressed rows": (compressed, lambda: compressed(2.0)),
    "quantised tensor": (lambda: quantised(0.1), lambda: quantised(0.2)),
    "masked array": (
        lambda: np.ma.array([1, 2], mask=[True, False]),
        lambda: np.ma.array([1, 2], mask=[False, False]),
    ),
    "bytes": (lambda: b"1", lambda: b"2"),
    "whole or not": (lambda: 1, lambda: 1.0),
    "true or one": (lambda: True, lambda: 1),
    "no number": (lambda: float("nan"), lambda: float("inf")),
    "function of random": (lambda: random.random, lambda: random.gauss),
    "function of NumPy": (lambda: np.random.rand, lambda: np.random.randn),
    "path": (lambda: Path("a/b.pt"), lambda: Path("a/c.pt")),
}


@pytest.mark.slow
def test_the_same_is_the_same_in_another_process() -> None:
    """With another order of sets, other addresses and another temporary folder."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {
        "PYTHONHASHSEED": seed,
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}:{Path(__file__).parent}",
    }
    command = [sys.executable, "-c", "import test_identity as t; t.main()"]
    out = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    assert json.loads(out.stdout) == everything()


def everything() -> dict[str, str]:
    """All of VALUES as a network's argument, and some that have no counterpart."""
    found = {kind: said(model=partial(Net, it=values[0]())) for kind, values in VALUES.items()}
    with tempfile.TemporaryDirectory() as folder:
        model = partial(Net, root=Path(folder), file=f"{folder}/weights.pt", net=Net)
        found["temporary"] = said(model=model)
        found["data"] = said(train_set=Drawn(root=folder, files=[f"{folder}/{i}" for i in "ab"]))
    found["optimiser"] = said(optimizer=Make(0.1))
    found["globals"] = said(model=of_globals, fit=logging_fit)
    found["fingerprint"] = fingerprint(found)
    for mode in ("high", "low", "random"):
        found[f"selection, {mode}"] = str(select([0, 3, 1, 0, 0, 2, 0], 0.4, mode).tolist())
    return found


def main() -> None:
    sys.stdout.write(json.dumps(everything()))


@pytest.mark.parametrize("kind", VALUES)
def test_another_argument_is_another_experiment(kind: str) -> None:
    one, other = VALUES[kind]
    assert said(model=partial(Net, it=one())) == said(model=partial(Net, it=one()))
    assert said(model=partial(Net, it=one())) != said(model=partial(Net, it=other()))
    assert "0x" not in said(model=partial(Net, it=one()))


@pytest.mark.slow
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
        max_leaves=6,
    )
)
def test_equal_values_are_the_same_experiment(value: Any) -> None:
    import copy

    def given_to(value: Any) -> Any:
        return drop_hot(fit=partial(fit, value=value)).configuration["fit"]

    mine = given_to(value)
    assert mine == given_to(copy.deepcopy(value))
    assert mine != given_to([value])


# --- code -----------------------------------------------------------------------------------------

lr_of_module = 0.1
config = Namespace(lr=0.1, folder="here")
table = {"lr": 0.1}
calls: list[int] = []
logger = logging.getLogger("test")
counter = 0


def helper(value: float) -> float:
    return value * 2


def of_globals() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 2), nn.Softplus(beta=helper(lr_of_module)))


def logging_fit(model: nn.Module, dataset: Any, epochs: int, **rest: Any) -> None:
    global counter
    counter += 1
    calls.append(epochs)
    logger.info("training")
    if os.environ.get("DROPHOT_TEST_LOG") or environ.get("DROPHOT_TEST_LOG"):
        sys.stderr.write(f"{random.random()}")
    fit(model, dataset, epochs, **rest)


def taking(*args: Any, it: Any, **rest: Any) -> None:
    fit(*args, **rest)


def closure(lr: float) -> Any:
    def make(parameters: Any) -> SGD:
        return SGD(parameters, lr=lr)

    return make


GLOBALS: dict[str, tuple[Any, str, Any]] = {
    "number": (lambda p: SGD(p, lr=lr_of_module), "lr_of_module", 0.2),
    "attribute": (lambda p: SGD(p, lr=config.lr), "config", Namespace(lr=0.2, folder="here")),
    "item": (lambda p: SGD(p, lr=table["lr"]), "table", {"lr": 0.2}),
    "function": (lambda p: SGD(p, lr=helper(0.1)), "helper", lambda value: value * 3),
}


@pytest.mark.parametrize("kind", GLOBALS)
def test_globals_that_are_used_belong_to_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, name, value = GLOBALS[kind]
    quiet = lambda parameters: SGD(parameters, lr=0.1)  # noqa: E731
    before, unused = drop_hot(fit=partial(fit, make=make)), said(optimizer=quiet)
    monkeypatch.setitem(globals(), name, value)
    assert drop_hot(fit=partial(fit, make=make)).configuration != before.configuration
    assert said(optimizer=quiet) == unused


@torch.library.custom_op("drophot_identity::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


def test_an_operator_is_its_name_and_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def use(parameters: Any) -> SGD:
        return SGD(parameters, lr=float(twice(torch.ops.aten.relu(torch.ones(1)))))

    before = drop_hot(fit=partial(fit, make=use)).configuration
    assert drop_hot(fit=partial(fit, make=use)).configuration == before
    monkeypatch.setattr(twice, "_init_fn", lambda x: 3 * x)
    assert drop_hot(fit=partial(fit, make=use)).configuration != before


def test_what_a_global_has_besides_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    make = GLOBALS["attribute"][0]
    before = said(optimizer=make)
    monkeypatch.setitem(globals(), "config", Namespace(lr=0.1, folder="there", more=object()))
    assert said(optimizer=make) == before


def test_what_is_filled_or_counted_while_it_runs_does_not() -> None:
    """Or the second grid of a script would refuse its own store."""
    make = Make(0.1)
    before = said(fit=logging_fit), said(optimizer=make)
    drop_hot(fit=logging_fit, optimizer=make).run()
    assert make.count > 0
    assert len(make.log) > 0
    assert len(calls) > 0
    assert (said(fit=logging_fit), said(optimizer=make)) == before


def test_a_comment_and_a_docstring_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "def make(p):{doc}\n    from torch.optim import SGD{more}\n    return SGD(p, lr={lr})\n"
    found = []
    for doc, more, lr in (("", "", 0.1), ("\n    'Words.'", "  # a comment\n", 0.1), ("", "", 0.2)):
        names: dict[str, Any] = {"__name__": "of_a_user"}
        exec(code.format(doc=doc, more=more, lr=lr), names)
        found.append(said(fit=partial(fit, make=names["make"])))
    assert found[0] == found[1] != found[2]


def freezing(weight: Tensor, std: float) -> None:
    nn.init.normal_(weight, std=std).requires_grad_(False)


def uniform(weight: Tensor, std: float) -> None:
    nn.init.uniform_(weight, -std * 3**0.5, std * 3**0.5)


class Drawing:
    """Draws a network's weights in a way that only the weights show."""

    def __init__(self, spread: float, draw: Any) -> None:
        self.spread, self.draw = spread, draw

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __call__(self) -> nn.Module:
        layer = nn.Linear(4, 2)
        self.draw(layer.weight, std=self.spread)
        return layer


def drawn_by(spread: float, draw: Any = nn.init.normal_) -> Any:
    return Drawing(spread, draw)


PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lambda": (
        {"optimizer": lambda p: SGD(p, lr=0.001)},
        {"optimizer": lambda p: SGD(p, lr=1.0)},
    ),
    "closure": ({"optimizer": closure(0.1)}, {"optimizer": closure(0.2)}),
    "object": ({"optimizer": Make(0.1)}, {"optimizer": Make(0.2)}),
    "bound method": ({"optimizer": Make(0.1).make}, {"optimizer": Make(0.2).make}),
    "optimiser": ({"optimizer": partial(SGD, lr=0.1)}, {"optimizer": partial(Adam, lr=0.1)}),
    "groups": (
        {"optimizer": lambda p: SGD([{"params": [q]} for q in p], lr=0.1)},
        {"optimizer": lambda p: SGD([{"params": list(p)}], lr=0.1)},
    ),
    "activation": (
        {"model": lambda: nn.Sequential(nn.Linear(4, 2), nn.ReLU())},
        {"model": lambda: nn.Sequential(nn.Linear(4, 2), nn.Identity())},
    ),
    "dropout": (
        {"model": lambda: nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 2))},
        {"model": lambda: nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 2))},
    ),
    "weights that are not drawn": (
        {"model": lambda: constant(0.1)},
        {"model": lambda: constant(0.2)},
    ),
    "frozen weights": ({"model": drawn_by(0.1)}, {"model": drawn_by(0.1, freezing)}),
    "weights drawn otherwise": ({"model": drawn_by(0.1)}, {"model": drawn_by(0.2)}),
    "weights drawn from another distribution": (
        {"model": drawn_by(0.1)},
        {"model": drawn_by(0.1, uniform)},
    ),
    "targets": ({"train_set": DATA}, {"train_set": TensorDataset(INPUTS, 1 - TARGETS)}),
    "test targets": ({"test_set": DATA}, {"test_set": TensorDataset(INPUTS, 1 - TARGETS)}),
}


def constant(value: float) -> nn.Module:
    layer = nn.Linear(4, 2)
    nn.init.constant_(layer.weight, value)
    return layer


# --- what is written to, and read from elsewhere --------------------------------------------------

shared: dict[str, Any] = {}


def by_item(parameters: Any) -> SGD:
    shared["seen"] = 1
    return SGD(parameters, lr=shared["lr"])


def by_default(parameters: Any) -> SGD:
    shared.setdefault("seen", 1)
    return SGD(parameters, lr=shared.get("lr"))


def by_update(parameters: Any) -> SGD:
    shared.update(seen=1)
    return SGD(parameters, lr=shared["lr"])


def by_all(parameters: Any) -> SGD:
    shared["seen"] = 1
    return SGD(parameters, **{name: shared[name] for name in shared if name != "seen"})


@pytest.mark.parametrize("make", [by_item, by_default, by_update, by_all])
def test_settings_count_where_code_also_writes_beside_them(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for lr in (0.1, 0.2):
        monkeypatch.setitem(globals(), "shared", {"lr": lr})
        before = drop_hot(fit=partial(fit, make=make)).configuration["fit"]
        make(net().parameters())
        assert drop_hot(fit=partial(fit, make=make)).configuration["fit"] == before
        found.append(before)
    assert found[0] != found[1]


def reading_imported() -> Any:
    import os as system
    from os import getenv as get

    return system.environ["DROPHOT_LR"], get("DROPHOT_LR")


OUTSIDE: dict[str, Callable[[], Any]] = {
    "item": lambda: os.environ["DROPHOT_LR"],
    "imported": lambda: environ["DROPHOT_LR"],
    "get": lambda: os.environ.get("DROPHOT_LR"),
    "getenv": lambda: os.getenv("DROPHOT_LR", "0.1"),
    "in": lambda: "DROPHOT_LR" in os.environ,
    "import within": reading_imported,
    "arguments": lambda: sys.argv[1],
    "parsed arguments": lambda: ArgumentParser().parse_args(),
}


@pytest.mark.parametrize("kind", OUTSIDE)
def test_the_environment_and_arguments_count_where_they_are_read(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(read: Any) -> Any:
        return drop_hot(fit=partial(fit, read=read)).configuration["fit"]

    before = of(OUTSIDE[kind])
    monkeypatch.setenv("DROPHOT_LR", "0.25")
    monkeypatch.setattr(sys, "argv", ["script", "--lr"])
    assert of(OUTSIDE[kind]) != before
    assert "0.25" not in json.dumps(of(OUTSIDE[kind])), "it might be a secret"


@pytest.mark.parametrize("source", ["open('lr')", "globals()['lr']", "eval('lr')"])
def test_what_no_store_can_compare_is_said(source: str, tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "of_a_user", "fit": fit}
    exec(f"def train(*a, **k):\n    lambda: {source}\n    fit(*a, **k)", names)
    with pytest.warns(UserWarning, match=source.partition("(")[0]):
        grid(drop_hot(fit=names["train"])).run(tmp_path)


MODULE = {
    "a setting": ("LR = 0.1", "LR = 0.2"),
    "its own import": ("from pk_of_test.other import LR", "from pk_of_test.other import LR2 as LR"),
}


@pytest.mark.parametrize("how", ["from pk_of_test import sub", "import pk_of_test.sub as sub"])
@pytest.mark.parametrize("kind", MODULE)
def test_modules_that_are_imported_within_count_by_what_is_used(
    kind: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    folder = tmp_path / "pk_of_test"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "other.py").write_text("LR, LR2 = 0.1, 0.2")
    names: dict[str, Any] = {"__name__": "of_a_user"}
    exec(f"def make(p):\n    {how}\n    return sub.make(p)", names)

    def of(source: str, remark: str = "") -> Any:
        for name in [name for name in sys.modules if name.startswith("pk_of_test")]:
            monkeypatch.delitem(sys.modules, name)
        (folder / "sub.py").write_text(
            f"from torch.optim import SGD\n{source}\n{remark}def make(p): return SGD(p, lr=LR)"
        )
        importlib.invalidate_caches()
        found = drop_hot(fit=partial(fit, make=names["make"])).configuration["fit"]
        assert drop_hot(fit=partial(fit, make=names["make"])).configuration["fit"] == found
        return found

    one, other = MODULE[kind]
    assert of(one) == of(one, "# a remark\n") != of(other)


def test_a_script_and_its_module_are_the_same_experiment() -> None:
    found = []
    for module in ("__main__", "g"):
        names: dict[str, Any] = {"__name__": module}
        exec(
            "import logging\nfrom torch import nn\nlog = logging.getLogger(__name__)\n"
            "class Net(nn.Linear): pass\n"
            "def net():\n    log.info(__name__)\n    return Net(4, 2)",
            names,
        )
        found.append(drop_hot(model=names["net"]).configuration)
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", PAIRS)
def test_another_experiment_is_another_configuration(kind: str) -> None:
    one, other = PAIRS[kind]
    assert said(**one) == said(**one)
    assert said(**one) != said(**other)


def test_weights_that_are_drawn_and_seeds_are_none() -> None:
    """Cells differ in them."""
    first, second = drop_hot(seed=0).configuration, drop_hot(seed=5).configuration
    assert {name for name in first if first[name] != second[name]} == {"seed"}


# --- data -----------------------------------------------------------------------------------------


class Drawn(Dataset[Any]):
    """Draws, so that it is not held in memory."""

    def __init__(self, flip: int = 0, noise: float = 0.1, **others: Any) -> None:
        self.flip, self.noise, self.cache = flip, noise, dict[int, Tensor]()
        vars(self).update(others)

    def __len__(self) -> int:
        return 40

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        self.cache[place] = INPUTS[place]
        return INPUTS[place] + self.noise * torch.randn(4), int(TARGETS[place]) ^ self.flip


class Other(Drawn):
    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        inputs, target = super().__getitem__(place)
        return inputs * (1 if place else 2), target


LABELS = [int(target) for target in TARGETS]
DRAWN: dict[str, tuple[Any, Any]] = {
    "labels": (Drawn(), Drawn(flip=1)),
    "augmentation": (Drawn(), Drawn(noise=0.2)),
    "an attribute": (Drawn(targets=LABELS), Drawn(targets=[*LABELS[:-1], 1 - LABELS[-1]])),
    "a transform": (Drawn(transform=nn.Dropout(0.1)), Drawn(transform=nn.Dropout(0.2))),
    "a subclass": (Drawn(), Other()),
    "a part": (Subset(Drawn(), range(20)), Subset(Drawn(), range(1, 21))),
    "within a part": (Subset(Drawn(), range(20)), Subset(Drawn(noise=0.2), range(20))),
}


@pytest.mark.parametrize("kind", DRAWN)
def test_other_data_that_is_not_in_memory_is_another_experiment(kind: str) -> None:
    one, other = DRAWN[kind]
    assert said(train_set=one) == said(train_set=one), "whatever it has read by now"
    assert said(train_set=one) != said(train_set=other)


def test_data_may_stand_in_another_folder_and_hold_an_open_file() -> None:
    with open(os.devnull) as file:  # noqa: PTH123
        first = said(train_set=Drawn(root="/data/here", files=["/data/here/1.png"], file=file))
    assert first == said(train_set=Drawn(root="/there", files=["/there/1.png"], file=file))
    assert first != said(train_set=Drawn(root="/there", files=["/there/2.png"], file=file))


# --- what cannot be known -------------------------------------------------------------------------


def grid(run: DropHot, **changes: Any) -> Grid:
    cells: dict[str, Any] = {"data_ratios": [0.5], "modes": ["random"], "prune_ratios": [0.5]}
    return Grid(run, **(cells | {"seeds": [0]} | changes))


@pytest.mark.parametrize("kind", ["file", "generator", "lock"])
@pytest.mark.parametrize("where", ["model", "optimizer", "fit"])
def test_what_cannot_be_known_is_refused_by_a_store_before_the_start(
    where: str, kind: str, tmp_path: Path
) -> None:
    import threading

    with open(os.devnull) as file:  # noqa: PTH123
        thing = {"file": file, "generator": (i for i in "ab"), "lock": threading.Lock()}[kind]
        owners: dict[str, Any] = {
            "model": partial(Net, it=thing),
            "optimizer": lambda p, it=thing: SGD(p, lr=0.1),
            "fit": partial(taking, it=Plain(inner=thing)),
        }
        run = drop_hot(**{where: owners[where]})
        with pytest.raises(TypeError, match=rf"{type(thing).__name__}.*`.*(it|inner)`.*`{where}`"):
            grid(run).run(tmp_path)
        assert list(tmp_path.iterdir()) == []
        assert grid(run).plan().runs == 3


def test_an_object_says_itself_what_counts(tmp_path: Path) -> None:
    class Logged(Make):
        def __getstate__(self) -> dict[str, Any]:
            return {"lr": self.lr}

    first, second, third = Logged(0.1), Logged(0.1), Logged(0.2)
    vars(first)["file"] = (i for i in "a")
    assert said(optimizer=first) == said(optimizer=second) != said(optimizer=third)
    assert grid(drop_hot(optimizer=first)).run(tmp_path) == grid(drop_hot(optimizer=second)).run(
        tmp_path
    )


# --- the switches of torch ------------------------------------------------------------------------


@contextmanager
def switched(turn: Callable[[Any], object], value: Any, before: Any) -> Iterator[None]:
    turn(value)
    try:
        yield
    finally:
        turn(before)


def warn_only(how: bool) -> None:
    torch.use_deterministic_algorithms(how, warn_only=True)


def tf32(value: bool) -> None:
    torch.backends.cudnn.allow_tf32 = value


def benchmark(value: bool) -> None:
    torch.backends.cudnn.benchmark = value


AMBIENT: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "precision": lambda: switched(torch.set_float32_matmul_precision, "medium", "highest"),
    "deterministic": lambda: switched(warn_only, True, False),
    "denormals": lambda: switched(torch.set_flush_denormal, True, False),
    "tf32": lambda: switched(tf32, False, True),
    "benchmark": lambda: switched(benchmark, True, False),
    "attention": lambda: switched(torch.backends.cuda.enable_flash_sdp, False, True),
}


@pytest.fixture(scope="module")
def run_of_tensors() -> DropHot:
    return drop_hot(optimizer=partial(Adam, lr=0.05))


@pytest.mark.parametrize("kind", AMBIENT)
def test_a_switch_of_torch_belongs_to_the_experiment_wherever_it_runs(
    kind: str, run_of_tensors: DropHot, tmp_path: Path
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    wanted = grid(run_of_tensors)
    with AMBIENT[kind]():
        ambient = run_of_tensors.configuration["ambient"]
        here = wanted.run(tmp_path / "here")
        with ThreadPoolExecutor(1) as pool:
            assert wanted.run(tmp_path / "there", pool) == here
        assert run_of_tensors.configuration["ambient"] == ambient
    assert run_of_tensors.configuration["ambient"] == {}
    with pytest.raises(ValueError, match="`ambient`"):
        wanted.run(tmp_path / "here")


@pytest.mark.skipif(sys.platform != "linux", reason="fork is for Linux")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork, since Python 3.12
def test_switches_are_set_in_processes_that_began_with_others(
    run_of_tensors: DropHot, tmp_path: Path
) -> None:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    wanted = grid(run_of_tensors)
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        with torch.autocast("cpu", torch.bfloat16):
            pool.submit(int).result()  # forked with autocast
        for kind in ("precision", "deterministic"):
            with AMBIENT[kind]():
                here = wanted.run(tmp_path / f"{kind}-here")
                assert wanted.run(tmp_path / f"{kind}-there", pool) == here
