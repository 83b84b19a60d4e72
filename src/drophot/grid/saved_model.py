"""A trained network as a file of a store holds it, with everything that the next stage needs."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from drophot._core import random_state
from drophot.grid.untracked_state import put_back, remainder
from drophot.pipeline.config import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedModel:
    """The result of a scoring or a training."""

    state: dict[str, Any]
    """The network's `state_dict`, on the CPU."""
    remainder: dict[str, Any]
    """Other state of the network that training changed."""
    indices: Tensor
    """The positions of the samples that it was trained on."""
    accuracy: float
    seconds: dict[str, float]
    """Seconds of the steps so far."""
    scores: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """The statistics of a scoring by name, each `(N,)`."""
    masks: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """The masks of a training that prunes, on the CPU."""

    def to_bytes(self) -> bytes:
        """The content of a file."""
        content = io.BytesIO()
        torch.save({one.name: getattr(self, one.name) for one in fields(self)}, content)
        return content.getvalue()

    @staticmethod
    def from_bytes(content: bytes) -> SavedModel:
        """The result in the content of a file."""
        values = torch.load(io.BytesIO(content), weights_only=True)
        return SavedModel(**cast("dict[str, Any]", values))

    def model(self, config: RunConfig) -> nn.Module:
        """The network as it was after its training."""
        model = _built(config)
        model.load_state_dict(self.state)
        put_back(model, self.remainder)
        return model


def saved_model(
    config: RunConfig,
    model: nn.Module,
    *,
    indices: Tensor,
    accuracy: float,
    seconds: Mapping[str, float],
    scores: Mapping[str, Tensor] | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> SavedModel:
    """The result of a stage that trained a network.

    Raises:
        TypeError: If training changed something that a file cannot hold.
    """
    state = {
        name: value.cpu() if isinstance(value, Tensor) else value  # or that of get_extra_state
        for name, value in model.state_dict().items()
    }
    twin = _built(config)
    twin.load_state_dict(state)
    return SavedModel(
        state=state,
        remainder=remainder(model, twin),
        indices=indices,
        accuracy=accuracy,
        seconds=dict(seconds),
        scores=dict(scores or {}),
        masks={name: mask.cpu() for name, mask in (masks or {}).items()},
    )


def _built(config: RunConfig) -> nn.Module:
    """A network as its training starts with."""
    with random_state.preserved_rng(config.device, seed=config.training_seed):
        return config.factory().to(config.device)
