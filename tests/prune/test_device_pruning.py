"""`magnitude_prune` on a GPU. `interpreted_pruning.py` tests its kernels without one."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drophot import magnitude_prune


def network(dtype: torch.dtype) -> nn.Module:
    layers = [nn.Conv2d(8, 64, 3), nn.Conv2d(64, 32, 3), nn.Linear(512, 700), nn.Linear(704, 3)]
    net = nn.Sequential(*layers, nn.Linear(4, 4)).to(dtype)
    net[1].to(memory_format=torch.channels_last)
    net[4].weight.data.zero_()
    return net


def importance(name: str, weight: nn.Parameter) -> Tensor:
    return (weight.detach() * 20).round()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:`ratio")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scope": "layer"},
        {"scope": "erk"},
        {"scope": "lamp"},
        {"min_kept": 0.1},
        {"pattern": "2:4"},
        {"importance": importance},
        {"importance": importance, "scope": "layer"},
    ],
)
def test_a_gpu_prunes_the_same_weights(dtype: torch.dtype, options: dict[str, Any]) -> None:
    here = network(dtype)
    there = copy.deepcopy(here).cuda()
    for ratio in (0.5,) if "pattern" in options else (0.5, 0.7):  # the second with earlier masks
        expected, found = (magnitude_prune(net, ratio, **options) for net in (here, there))
        assert all(torch.equal(mask.cpu(), expected[name]) for name, mask in found.items())
    for name, weight in there.state_dict().items():
        assert torch.equal(weight.cpu(), here.state_dict()[name]), name


@pytest.mark.gpu
def test_denormal_weights_on_a_gpu() -> None:
    here = nn.Linear(1000, 100)
    here.weight.data.mul_(1e-38)
    there = copy.deepcopy(here).cuda()
    expected, found = magnitude_prune(here, 0.6), magnitude_prune(there, 0.6)
    assert torch.equal(found["weight"].cpu(), expected["weight"])


@pytest.mark.gpu
def test_memory_on_a_gpu() -> None:
    model = nn.Sequential(*(nn.Linear(2000, 2000, bias=False) for _ in range(5))).cuda()
    magnitude_prune(copy.deepcopy(model), 0.5)
    size = sum(weight.nbytes for weight in model.parameters())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    masks = magnitude_prune(model, 0.8)
    assert torch.cuda.max_memory_allocated() - before < 0.4 * size
    assert masks.sparsity == 0.8
