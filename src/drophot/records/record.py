"""The result of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from drophot._core.arrays import IntArray
from drophot._core.json_values import Json
from drophot.records.coreset_text import from_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The result of one run of the five steps.

    Accuracies are on the test set, in [0, 1], each after the last epoch of its step, never after
    the best one. Two records are equal if everything but their seconds is equal.
    `pandas.DataFrame(records)` gives a row for each.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from drophot import DropHot
        >>> from drophot.models import fcnet
        >>> from drophot.records import from_line, to_line
        >>> data = TensorDataset(torch.eye(8), torch.arange(8) % 2)
        >>> model = partial(fcnet, in_features=8, hidden=4, num_classes=2)
        >>> settings = dict(data_ratio=0.5, mode="random", prune_ratio=0.5)
        >>> record = DropHot(model, data, data, **settings).run()
        >>> record.mode, record.num_kept, record.sparsity
        ('random', 4, 0.5)
        >>> record.finetuned_accuracy == record.finetune_curve[-1]
        True
        >>> from_line(to_line(record)) == record
        True
    """

    model: str
    """The name of the network."""
    mode: str
    """How the kept samples were chosen: the name of the mode, or "baseline" if all were kept."""
    keep_ratio: float
    """The share of training samples to keep, as requested."""
    num_kept: int
    """The number of training samples kept, `K`; per epoch for a mode that reselects samples."""
    prune_ratio: float
    """The share of prunable weights to remove, as requested."""
    seed: int
    """The seed of initialization, order and ties."""
    trained_accuracy: float
    """After training on the coreset, before pruning."""
    pruned_accuracy: float
    """Right after pruning; with a schedule, right after its first pruning."""
    finetuned_accuracy: float
    """After fine-tuning on the full training set: the last entry of the curve."""
    finetune_curve: tuple[float, ...]
    """After each epoch of fine-tuning."""
    sparsity: float
    """The share of prunable weights that are zero or removed after fine-tuning, as counted in the
    network. Matrices that are not prunable do not count; `DropHot` warns if they hold more than 1 %
    of the weights."""
    seconds: dict[str, float] = field(compare=False)
    """Wall-clock seconds of each step that was needed. If the baseline of a grid is the network of
    step 1, it has the seconds of "score" and none of "train"."""
    device: str
    """The device of the run."""
    versions: dict[str, str]
    """The versions of drophot, torch, NumPy and Python."""
    fingerprint: str
    """The fingerprint of the whole configuration, seed and ratios included: see `fingerprint`."""
    protocol: str = "paper"
    """The protocol: "paper", "released" for what the paper's released code does instead, or the
    name of another one."""
    equal_steps: bool = False
    """Whether training on the coreset took as many optimizer steps as on the full training set."""
    reinitialized: bool = False
    """Whether the pruned network was fine-tuned from new random weights."""
    rewound: bool = False
    """Whether the pruned network was fine-tuned from the weights that training started with."""
    recalibrated: bool = False
    """Whether the statistics of BatchNorm were recomputed after pruning."""
    schedule: str = "one-shot"
    """When weights were removed: "one-shot" before fine-tuning, "gradual" or "iterative" during
    fine-tuning, or "joint" while the network was trained on the coreset."""
    scope: str = "layer"
    """How the removed share was divided among the layers."""
    structured: bool = False
    """Whether channels were removed, in which case `prune_ratio` is the share of channels. With a
    budget, which is in `settings`, it is the largest share that a layer may have lost."""
    importance: str = "magnitude"
    """What the weights or channels were ranked by: "magnitude", or the name of the importance."""
    parameters: int = 0
    """The number of parameters of the final network, zeros included; 0 in older records."""
    settings: dict[str, Json] = field(default_factory=dict, compare=False)
    """The whole configuration without the seed, as JSON holds it; empty in older records."""
    cell: str = field(default="", compare=False)
    """The fingerprint of `settings`, which is the same for all seeds of a cell of a grid."""
    test_samples: int = 0
    """The size of the test set, or 0 if it is unknown."""
    coreset: str = field(default="", compare=False, repr=False)
    """The kept samples as compressed text: see `indices`. Empty if all samples were kept, for a
    mode that reselects samples, and in older records."""

    def indices(self) -> IntArray | None:
        """The positions of the kept samples in the training set.

        Returns:
            The positions, int64, ascending, shape `(K,)`; `None` if the record does not hold them.

        Raises:
            ValueError: If `coreset` is not a text that drophot wrote.
        """
        return from_text(self.coreset)[0] if self.coreset else None


def fingerprint(configuration: Mapping[str, Json]) -> str:
    """Compute a short name for a configuration that is equal if the configurations are equal.

    Args:
        configuration: Names and values that JSON can hold. The order of the names does not matter.

    Returns:
        16 hexadecimal digits, the start of the SHA-256 of the canonical JSON.

    Raises:
        TypeError: If JSON cannot hold a value.

    Example:
        >>> fingerprint({"seed": 0, "ratio": 0.5}) == fingerprint({"ratio": 0.5, "seed": 0})
        True
    """
    text = json.dumps(configuration, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
