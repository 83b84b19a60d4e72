"""The configuration of a store: all that its results depend on, except what the grid varies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from drophot._core.importance import RunImportance, importance_name
from drophot._core.installed_packages import minor_version
from drophot._core.json_values import Json
from drophot._core.user_warnings import warn
from drophot.pipeline.config import RunConfig
from drophot.pipeline.modes import own_score_of
from drophot.pipeline.provenance import environment
from drophot.pipeline.provenance.fingerprints import unseen
from drophot.pipeline.provenance.own_objects import described, own_objects, unknown_parts
from drophot.pipeline.provenance.run_record import configuration
from drophot.records.record import fingerprint
from drophot.settings.names import Mode, name_of
from drophot.settings.tables import varying


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The configuration of a store, as JSON can hold it."""

    configuration: dict[str, Json]
    modes: dict[str, Json]
    """The modes, scores and importances by name. A store may be extended by others, but none may
    change."""
    data: str
    """The digest of the two datasets."""


def identify(
    config: RunConfig, modes: Iterable[Mode], importances: Iterable[RunImportance], threads: int
) -> Identity:
    """The identity of a grid's results.

    Raises:
        TypeError: If a part of the run cannot be compared between processes.
    """
    runs = [replace(config.settings, mode=mode) for mode in modes]
    ranked = [replace(config.settings, importance=one) for one in importances]
    everything = [*runs, *ranked]
    unknown = [part for run in everything for part in unknown_parts(run)]
    unknown = [*config.experiment.unknown, *unknown]
    if unknown:
        raise TypeError(
            f"A store must know which experiment it is of, but no other process can compare "
            f"{unknown[0]}. Create it where it is used, or give its owner a `__getstate__` that "
            f"leaves it out."
        )
    own = [thing for run in everything for thing in own_objects(run)]
    if blind := unseen([config.factory, config.optimizer, config.fit, *own]):
        warn(
            f"A store cannot tell whether these have changed: {', '.join(blind)}. Use another "
            f"store after a change."
        )
    versions = environment.versions()
    found: dict[str, Json] = {
        "versions": {name: minor_version(versions[name]) for name in ("drophot", "torch", "python")}
    }
    found |= configuration(config)
    for name in varying():
        found.pop(name, None)
    found["threads"] = threads
    found["device"] = environment.device_name(config.device)
    data = fingerprint({name: found[name] for name in ("train_set", "test_set")})
    described_modes = {name_of(run.mode): described(run.mode) for run in runs}
    scores = [score for run in runs if (score := own_score_of(run.mode)) is not None]
    described_modes |= {f"score {score.name}": described(score) for score in scores}
    described_modes |= {
        f"importance {importance_name(run.importance)}": described(run.importance)
        for run in ranked
        if run.importance is not None
    }
    return Identity(
        configuration=found,
        modes=described_modes,
        data=data,
    )
