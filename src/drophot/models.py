"""The paper's four networks.

Plain modules with torch's default initialization. Each function is a model factory for
:class:`drophot.DropHot`; for other sizes, wrap it in `functools.partial`.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor, nn
from torch.nn import functional as F


def fcnet(in_features: int = 784, hidden: int = 256, num_classes: int = 10) -> nn.Module:
    """Return the paper's FCNet: a fully connected network with one hidden layer and ReLU.

    Args:
        in_features: Numbers per input, whatever its shape: 28 · 28 for MNIST.
        hidden: Width of the hidden layer.
        num_classes: Number of classes `C`.

    Returns:
        A module that maps inputs `(B, …)` to logits `(B, C)`.

    Example:
        >>> sum(p.numel() for p in fcnet().parameters())
        203530
    """
    return nn.Sequential(
        nn.Flatten(), nn.Linear(in_features, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
    )


class LeNet(nn.Module):
    """The class of the network that `lenet` returns.

    Args:
        num_classes: Number of classes `C`.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(256, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of images.

        Args:
            inputs: Images, shape `(B, 1, 28, 28)`.

        Returns:
            Logits, shape `(B, C)`.
        """
        x = F.max_pool2d(F.relu(self.conv1(inputs)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


def lenet(num_classes: int = 10) -> nn.Module:
    """Return the paper's LeNet: ReLU, 2×2 max pooling, no padding, 44,426 parameters.

    After LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998,
    https://doi.org/10.1109/5.726791. Parameter names are those of the paper's published weights.

    Args:
        num_classes: Number of classes `C`.

    Returns:
        A module that maps inputs `(B, 1, 28, 28)` to logits `(B, C)`.

    Example:
        >>> sum(p.numel() for p in lenet().parameters())
        44426
    """
    return LeNet(num_classes)


def resnet18(num_classes: int = 10) -> nn.Module:
    """Return the paper's ResNet-18: torchvision's model with `num_classes` outputs.

    The stem is the 7×7 convolution of stride 2, also for 32×32 inputs, as in the paper's
    experiments. After He et al., Deep Residual Learning for Image Recognition, 2016,
    https://arxiv.org/abs/1512.03385.

    Args:
        num_classes: Number of classes `C`.

    Returns:
        A module that maps inputs `(B, 3, H, W)` to logits `(B, C)`.

    Raises:
        ImportError: If torchvision is not installed.
    """
    return _torchvision_models().resnet18(num_classes=num_classes)


def resnet50(num_classes: int = 10) -> nn.Module:
    """Return the paper's ResNet-50: as `resnet18`, with 50 layers.

    Args:
        num_classes: Number of classes `C`.

    Returns:
        A module that maps inputs `(B, 3, H, W)` to logits `(B, C)`.

    Raises:
        ImportError: If torchvision is not installed.
    """
    return _torchvision_models().resnet50(num_classes=num_classes)


def _torchvision_models() -> ModuleType:
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError('The ResNets need torchvision: pip install "drophot[vision]"') from error
    return models
