"""The state of a tracker as a file in the checkpoints of Hugging Face's Trainer."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from drophot.tracking.forgetting import ForgettingTracker

NAME = "tracker.pt"
_LAST_FILE = "trainer_state.json"  # the last file that the Trainer writes into a checkpoint


def save(tracker: ForgettingTracker, folder: Path) -> None:
    """Save a tracker's state in the folder of a checkpoint, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{NAME}.part"
    torch.save(tracker.state_dict(), part)
    part.replace(folder / NAME)


def load(tracker: ForgettingTracker, folder: Path) -> None:
    """Restore a tracker's state from the folder of a checkpoint.

    Raises:
        FileNotFoundError: If the checkpoint has no such state.
    """
    file = folder / NAME
    if not file.exists():
        raise FileNotFoundError(
            f"The checkpoint {folder} has no state of the tracker, {NAME}. Resume from a "
            f"checkpoint that was saved with a tracker."
        )
    tracker.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))


def last_complete(folder: Path) -> str | None:
    """The last checkpoint that was completely written and has a tracker's state."""
    found: list[tuple[int, str]] = []
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if not step.isdigit() or not (path / NAME).exists():
            continue
        try:
            json.loads((path / _LAST_FILE).read_text())
        except (OSError, ValueError):
            continue
        found.append((int(step), str(path)))
    return max(found)[1] if found else None
