"""The result of a run, its JSON lines, and the cells that runs with different seeds belong to."""

from drophot.records.json_lines import from_line, read, to_line, write
from drophot.records.record import Record, fingerprint

__all__ = ["Record", "fingerprint", "from_line", "read", "to_line", "write"]
