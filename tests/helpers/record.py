"""One record, with any fields replaced."""

from typing import Any

from drophot import Record


def one(**changes: Any) -> Record:
    values: dict[str, Any] = {
        "model": "lenet",
        "mode": "high",
        "keep_ratio": 0.1,
        "num_kept": 6000,
        "prune_ratio": 0.8,
        "seed": 0,
        "trained_accuracy": 0.9,
        "pruned_accuracy": 0.5,
        "finetuned_accuracy": 0.95,
        "finetune_curve": (0.93, 0.95),
        "sparsity": 0.8,
        "seconds": {"train": 1.5},
        "device": "cpu",
        "versions": {"torch": "2"},
        "fingerprint": "0" * 16,
    }
    return Record(**(values | changes))
