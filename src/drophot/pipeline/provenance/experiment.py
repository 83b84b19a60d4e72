"""The identity of an experiment: its network, optimizer, training loop and data.

It is read from the user's factories and from what they make. A lambda whose learning rate was
changed is therefore another experiment, although its name is the same.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import floor, isfinite, log10
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, TensorDataset

from drophot._core import random_state
from drophot._core.installed_packages import qualified_name, stable_name
from drophot._core.json_values import Json
from drophot.pipeline.provenance.digests import digest, digest_of, text_of
from drophot.pipeline.provenance.fingerprints import MODULE_ATTRIBUTES, attributes, describe

_SAMPLES = 32  # how many samples of data that is not in memory are compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """The parts of a run besides its settings, as JSON can hold them."""

    description: Mapping[str, Json]
    """`model`, `optimizer`, `fit`, `train_set` and `test_set`."""
    unknown: tuple[str, ...]
    """The parts that two processes cannot compare, each with its argument."""


def describe_experiment(
    factory: Callable[[], nn.Module],
    optimizer: Callable[[Iterator[nn.Parameter]], Optimizer],
    fit: Callable[..., object],
    *,
    given: tuple[Dataset[Any], Dataset[Any]],
    prepared: tuple[Dataset[Any], Dataset[Any]],
    device: torch.device,
) -> Experiment:
    """Describe the factories, what they make, the training loop, and the data.

    Args:
        factory: Makes models.
        optimizer: Makes optimizers.
        fit: The training loop.
        given: The training and the test set as the user gave them.
        prepared: The same datasets as they are used in training, possibly in memory.
        device: Where the run takes place.
    """
    with random_state.preserved_rng(device, seed=0):
        model, twin = factory(), factory()
        made = optimizer(model.parameters())
    with random_state.preserved_rng(device, seed=0):
        again = _summaries(factory())
    unknown: list[str] = []

    def told(name: str, thing: object) -> Any:
        found, lacks = describe(thing)
        unknown.extend(f"{lack} in `{name}`" for lack in lacks)
        return found

    description = {
        "model": {"factory": told("model", factory), **_network(model, twin, again, unknown)},
        "optimizer": {**_optimizer(made, told), "factory": told("optimizer", optimizer)},
        "fit": told("fit", fit),
        "train_set": _data(given[0], prepared[0]),
        "test_set": _data(given[1], prepared[1]),
    }
    return Experiment(description=description, unknown=tuple(unknown))


def _network(
    model: nn.Module, twin: nn.Module, again: dict[str, Any], unknown: list[str]
) -> dict[str, Any]:
    """A network as it was built; random values, which differ in its twin, are summarized."""
    modules, others = _modules(model), _modules(twin)
    settings: dict[str, Any] = {}
    for name, module in modules.items():
        own, drawn = attributes(module), attributes(others.get(name))
        settings[name] = [stable_name(type(module))] + [
            [key, value if drawn.get(key) == value else "drawn"]
            for key, value in sorted(own.items())
            if key not in MODULE_ATTRIBUTES  # compared elsewhere, or by their code
        ]
    values = {}
    other = _tensors(twin)
    for name, tensor in _tensors(model).items():
        same = name in other and _equal(tensor, other[name])
        value = describe(tensor)[0] if same else _drawn(tensor, again.get(name))
        values[name] = [value, tensor.requires_grad]
    extra = {k: v for k, v in model.state_dict().items() if not isinstance(v, Tensor)}
    for name, value in extra.items():
        if not can_be_loaded(value):
            unknown.append(f"{qualified_name(type(value))} as the state `{name}` of `model`")
    classes = {type(module) for module in modules.values()}
    codes = sorted((describe(cls)[0] for cls in classes), key=text_of)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": dict(sorted(Counter(type(m).__name__ for m in modules.values()).items())),
        "network": digest_of([settings, values, describe(extra)[0]]),
        "code": digest_of(codes),
    }


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(cast(Iterator[tuple[str, nn.Module]], model.named_modules()))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def _summaries(model: nn.Module) -> dict[str, Any]:
    return {name: _summary(tensor) for name, tensor in _tensors(model).items()}


def _drawn(tensor: Tensor, again: Any) -> list[Any]:
    """A summary of a random tensor, without its values if the same seed draws others."""
    found = _summary(tensor)
    return [str(tensor.dtype), list(tensor.shape), found if found == again else "random"]


def _summary(tensor: Tensor) -> list[float] | None:
    """The mean, standard deviation and largest size of values, to two digits of the latter two."""
    # Rounded: a patch release of torch may draw numbers that differ in their last bits.
    usable = tensor.layout == torch.strided and not tensor.is_quantized and tensor.numel()
    if not usable or tensor.device.type == "meta":
        return None
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    values = tensor.detach().double()
    mean, spread, largest = (
        float(value) for value in (values.mean(), values.std(correction=0), values.abs().max())
    )
    if not isfinite(mean) or not isfinite(spread):
        return None
    digits = 1 - floor(log10(largest)) if largest else 0
    spread, largest = (float(f"{value:.1e}") for value in (spread, largest))
    return [round(mean, digits) + 0.0, spread, largest]  # 0.0: no negative zero


def _optimizer(made: Optimizer, told: Callable[[str, object], Any]) -> dict[str, Any]:
    """The type of an optimizer, and the settings of its parameter groups."""
    groups = [
        {
            **{k: told("optimizer", v) for k, v in group.items() if k not in _OF_PARAMETERS},
            "tensors": [list(parameter.shape) for parameter in group["params"]],
        }
        for group in made.param_groups
    ]
    for group in groups:
        group["tensors"] = [len(group["tensors"]), digest_of(group["tensors"])]
    kind = describe(type(made))[0]
    return {"type": kind, **(groups[0] if len(groups) == 1 else {"groups": groups})}


_OF_PARAMETERS = ("params", "param_names")


def _data(given: Any, prepared: Any) -> dict[str, Any]:
    """A dataset by its values, or if it is not in memory by its code, settings and some samples."""
    if isinstance(prepared, TensorDataset):
        inputs, targets = prepared.tensors[:2]
        return {
            "samples": len(inputs),
            "inputs": f"{inputs.dtype} {list(inputs.shape[1:])} {digest([inputs])}",
            "targets": f"{targets.dtype} {digest([targets])}",
        }
    before = attributes(given, data=True)
    samples = _samples(given)
    after = attributes(given, data=True)  # an attribute that reading changes is no setting
    return {
        "samples": len(given),
        "type": describe(type(given), data=True)[0],
        "settings": {name: value for name, value in before.items() if after.get(name) == value},
        "some": samples,
    }


def _samples(data: Any) -> list[str]:
    """Digests of the inputs and of the targets of some samples, unless these change."""
    size = len(data)
    positions = sorted({i * (size - 1) // (_SAMPLES - 1) for i in range(_SAMPLES)})

    def read() -> list[str]:
        with random_state.preserved_rng(seed=0):
            columns = zip(*(data[position] for position in positions), strict=True)
            return [digest([torch.as_tensor(part) for part in column]) for column in columns]

    pairs = zip(read(), read(), strict=True)
    return [once if once == again else "random" for once, again in pairs]


def can_be_loaded(value: Any) -> bool:
    """Whether `torch.load` can read the value from a file without running code."""
    content = io.BytesIO()
    try:
        torch.save(value, content)
        content.seek(0)
        torch.load(content, weights_only=True)
    except Exception:
        return False
    return True


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.device.type == "meta":
        return False
    return torch.equal(one, other)
