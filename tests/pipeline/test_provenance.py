"""What a record says of where a result comes from."""

from functools import partial

import torch

from drophot.pipeline.provenance.callables import callable_text, factory_name
from drophot.pipeline.provenance.environment import versions


def test_callables_are_described_without_addresses() -> None:
    class Callable:
        def __call__(self) -> None: ...

    adam = partial(torch.optim.Adam, lr=0.1, betas=(0.9, 0.99))
    assert callable_text(adam) == "torch.optim.adam.Adam(betas=(0.9, 0.99), lr=0.1)"
    assert callable_text(callable_text).endswith("callables.callable_text")
    assert callable_text(Callable()).endswith("Callable")
    norm = partial(Callable, norm=lambda x: x, model=object())
    assert "norm=" in callable_text(norm)
    assert "0x" not in callable_text(norm)
    assert "0x" not in callable_text(lambda: 0) + callable_text(Callable())


def test_a_models_name_is_its_factorys_or_its_class() -> None:
    model = torch.nn.Linear(1, 1)
    assert factory_name(partial(partial(callable_text, 1), 2), model) == "callable_text"
    assert factory_name(torch.nn.Linear, model) == "Linear"
    assert factory_name(lambda: model, model) == "Linear"


def test_versions_are_those_installed() -> None:
    assert versions()["torch"] == torch.__version__
    assert set(versions()) == {"drophot", "torch", "numpy", "python"}
