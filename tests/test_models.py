import builtins
from functools import partial
from typing import Any

import pytest
import torch

from drophot.models import fcnet, lenet, resnet18, resnet50

PAPER = [
    (fcnet, 203_530, (1, 28, 28), 10),
    (lenet, 44_426, (1, 28, 28), 10),
    # torchvision's ImageNet models (11,689,512 and 25,557,032) with a last layer for C classes.
    (resnet18, 11_689_512 - 513 * 1000 + 513 * 10, (3, 32, 32), 10),
    (partial(resnet18, 100), 11_689_512 - 513 * 1000 + 513 * 100, (3, 32, 32), 100),
    (resnet50, 25_557_032 - 2049 * 1000 + 2049 * 10, (3, 32, 32), 10),
]


@pytest.mark.parametrize(("factory", "parameters", "shape", "classes"), PAPER)
def test_the_papers_networks(
    factory: Any, parameters: int, shape: tuple[int, ...], classes: int
) -> None:
    if "resnet" in repr(factory):
        pytest.importorskip("torchvision")
    model = factory()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.randn(2, *shape)).shape == (2, classes)
    assert factory() is not model


def test_resnets_keep_the_stem_of_stride_two() -> None:
    pytest.importorskip("torchvision")
    for factory in (resnet18, resnet50):
        stem = factory().conv1
        assert isinstance(stem, torch.nn.Conv2d)
        assert (stem.kernel_size, stem.stride) == ((7, 7), (2, 2))


def test_lenet_is_relu_and_max_pooling() -> None:
    """By hand from its layers, so that another activation or pooling would show."""
    model: Any = lenet()
    x = torch.randn(3, 1, 28, 28)
    h = torch.nn.functional.conv2d(x, model.conv1.weight, model.conv1.bias).clamp(min=0)
    h = h.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
    h = torch.nn.functional.conv2d(h, model.conv2.weight, model.conv2.bias).clamp(min=0)
    h = h.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2)).reshape(3, 256)
    for layer in (model.fc1, model.fc2):
        h = (h @ layer.weight.T + layer.bias).clamp(min=0)
    assert torch.allclose(model(x), h @ model.fc3.weight.T + model.fc3.bias, atol=1e-5)


def test_other_sizes() -> None:
    assert fcnet(64, 32, 7)(torch.randn(2, 8, 8)).shape == (2, 7)
    assert lenet(47)(torch.randn(2, 1, 28, 28)).shape == (2, 47)


def test_a_missing_torchvision_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("torchvision"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "drophot\[vision\]"'):
        resnet18()
