"""Coresets as text that a record can hold: a compressed bit for each sample."""

from __future__ import annotations

import base64
import binascii
import zlib

import numpy as np

from drophot._core.arrays import IntArray


def to_text(indices: IntArray, num_samples: int) -> str:
    """The text of a coreset, about a sixth of a byte per sample if a tenth of them is kept."""
    kept = np.zeros(num_samples, dtype=bool)
    kept[indices] = True
    packed = zlib.compress(np.packbits(kept).tobytes(), level=9)
    return f"{num_samples}:{base64.b85encode(packed).decode()}"


def from_text(text: str) -> tuple[IntArray, int]:
    """The positions of the kept samples, ascending, and the number of samples `N`."""
    total, _, packed = text.partition(":")
    try:
        bits = np.frombuffer(zlib.decompress(base64.b85decode(packed)), dtype=np.uint8)
        if len(bits) != (int(total) + 7) // 8:
            raise ValueError(f"it holds {8 * len(bits)} bits for {total} samples")
        return np.unpackbits(bits, count=int(total)).nonzero()[0], int(total)
    except (ValueError, binascii.Error, zlib.error) as error:
        raise ValueError(
            f"`coreset` of a record must be a text that drophot wrote, got {text[:40]!r}: {error}."
        ) from error
