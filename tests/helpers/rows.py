"""Records of a small grid."""

import math
from typing import Any

from helpers.record import one

from drophot import Record


def grid(
    keeps: tuple[float, ...] = (0.1, 0.5),
    prunes: tuple[float, ...] = (0.0, 0.8),
    modes: tuple[str, ...] = ("baseline", "low", "high", "random"),
    seeds: int = 3,
    **changes: Any,
) -> list[Record]:
    """Records whose numbers are all different, and differences between modes not all alike."""
    found = []
    for seed in range(seeds):
        for mode in modes:
            for keep in (1.0,) if mode == "baseline" else keeps:
                for prune in prunes:
                    step = ("baseline", "low", "high", "random").index(mode)
                    end = 0.95 - 0.01 * step * (1.1 - keep) - 0.02 * prune
                    end += 0.004 * math.sin(13 * seed + 5 * step + 31 * keep + 7 * prune)
                    found.append(
                        one(
                            mode=mode,
                            keep_ratio=keep,
                            num_kept=round(60_000 * keep),
                            prune_ratio=prune,
                            seed=seed,
                            trained_accuracy=end - 0.02,
                            pruned_accuracy=end - 0.02 - 0.3 * prune,
                            finetuned_accuracy=end,
                            finetune_curve=(end - 0.01, end),
                            seconds={"train": 10 * keep + seed, "finetune": 20.0 + len(found)},
                            **changes,
                        )
                    )
    return found


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
