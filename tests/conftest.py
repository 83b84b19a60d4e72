"""What all tests share: one thread each, and the real data where it is."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

torch.set_num_threads(1)  # the networks here are so small that threads wait for each other


# No time limits, since machines differ; the same examples each time where nobody can look.
hypothesis.settings.register_profile("drophot", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("drophot")


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    root = SHARED / "data"
    if not (root / "MNIST" / "raw").exists():
        pytest.skip("real MNIST is not beside the checkout")
    return root


@pytest.fixture(scope="session")
def published_lenet() -> Path:
    path = SHARED / "paper" / "lenet_baseline.npz"
    if not path.exists():
        pytest.skip("the authors' published LeNet is not beside the checkout")
    return path
