"""The Ray session that a comparison runs in."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from tune_hypergrad.errors import InputError, in_one_line

_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # Ray's own tables would tear ours
    "TUNE_GLOBAL_CHECKPOINT_S": "5",  # trials younger than the last snapshot are forgotten when the driver dies
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # trials without a GPU see none
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # one method's result without the metric would end all methods
}


# of failed trials the report tells, and searchers of what they passed over
_LOGGERS = (
    "hpbandster",
    "ray.tune.tune",
    "ray.tune.analysis.experiment_analysis",
    "ray.tune.execution.tune_controller",
)


@contextmanager
def cluster_session(address: str | None = None, pending: int = 1) -> Iterator[None]:
    """A Ray session for the body: this process's, the cluster at `address`, or one of this machine's own.

    Args:
        address: of a cluster to join.
        pending: trials that may wait for their place at once.

    Raises:
        InputError: no cluster answers at `address`.
    """
    settings = {**_SETTINGS, "TUNE_MAX_PENDING_TRIALS_PG": str(pending)}
    before = {name: os.environ.get(name) for name in settings}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # NaN is what a diverged run reports
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    ours = not ray.is_initialized()
    if ours:
        _start(address)
    try:
        yield
    finally:
        if ours:
            ray.shutdown()
        for name, former in before.items():
            if former is None:
                os.environ.pop(name, None)


def _start(address: str | None) -> None:
    dashboard = False if address is None else None
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, include_dashboard=dashboard)
    except ConnectionError as error:
        raise InputError(f"no Ray cluster answers at {address!r}: {in_one_line(error)}") from error
