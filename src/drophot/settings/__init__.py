"""The settings of a run, each declared once with everything that the library needs to know.

A field of :class:`Settings` is the only declaration of a setting. Its metadata, a :class:`Setting`,
says how a value is checked, which stages of a grid depend on it, how a grid varies it, and where
records, file names and tables show it. The constructor of :class:`drophot.DropHot`, the runs and
controls of :class:`drophot.Grid`, the pairing of records in :mod:`drophot.stats` and the columns of
:mod:`drophot.report` are derived from these fields.

To add a setting, add a field in `declarations.py`, describe it in the docstring of `Settings`, and
use it in the step that it changes. If it cannot be combined with another one, add the pair in
`combinations.py`.
"""

from drophot._core.setting_declaration import Setting
from drophot.settings.declarations import Settings
from drophot.settings.names import Named

__all__ = ["Named", "Setting", "Settings"]
