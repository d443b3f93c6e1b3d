"""The Ray session that a comparison runs in."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import ray.util.client

from tune_hypergrad.errors import InputError, in_one_line

_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # Ray's own tables would tear ours
    "TUNE_GLOBAL_CHECKPOINT_S": "5",  # trials younger than the last snapshot begin again when the driver dies
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # trials without a GPU see none
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # one method's result without the metric would end all methods
}

_NO_CLIENT = "the comparison itself has to run on a machine of the cluster, with address='auto'"
_TOKEN = "; if it asks for a token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to its token"
_TIMEOUT = 10.0  # seconds in which a cluster accepts a connection

# of failed trials the report tells, and searchers of what they passed over; that tokens are on is no news to those who
# have the only one
_LOGGERS = {
    "hpbandster": logging.CRITICAL,
    "ray._private.authentication.authentication_token_setup": logging.ERROR,
    "ray.tune.tune": logging.CRITICAL,
    "ray.tune.analysis.experiment_analysis": logging.CRITICAL,
    "ray.tune.execution.tune_controller": logging.CRITICAL,
    "tensorboardX.x2num": logging.ERROR,  # NaN is what a diverged run reports
}


@contextmanager
def cluster_session(address: str | None = None, pending: int = 1) -> Iterator[None]:
    """A Ray session for the body: this process's, the cluster at `address`, or one of this machine's own.

    Args:
        address: of a cluster to join.
        pending: trials that may wait for their place at once.

    Raises:
        InputError: no cluster answers at `address`, or this process is in another's session already.
    """
    settings = {**_SETTINGS, "TUNE_MAX_PENDING_TRIALS_PG": str(pending)}
    before = {name: os.environ.get(name) for name in settings}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name, level in _LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    ours = not ray.is_initialized()
    try:
        if ours:
            _start(address)
        else:
            _check_address(address)
        yield
    finally:
        if ours:
            ray.shutdown()
        for name, former in before.items():
            if former is None:
                os.environ.pop(name, None)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def refuse_client(what: str, address: str) -> None:
    """Refuse an address that is one of Ray Client.

    Raises:
        InputError: it is.
    """
    if address.startswith("ray://"):
        raise InputError(f"{what}: {_NO_CLIENT}")


def _start(address: str | None) -> None:
    # where no address is given, Ray takes the environment's
    named = os.environ.get("RAY_ADDRESS") or None if address in (None, "auto") else address
    if named is not None:
        refuse_client(f"RAY_ADDRESS is {named!r}", named)
    dashboard = False if address is None else None
    listening = False
    try:
        if named is not None and ":" in named:
            _knock(named)  # Ray would try for minutes
            listening = True
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, include_dashboard=dashboard)
    except OSError as error:  # a ConnectionError is one too
        if address is None and named is None and not isinstance(error, ConnectionError):
            raise
        hint = _TOKEN if listening else ""  # Ray does not say that it was this
        raise InputError(f"no Ray cluster answers at {named or address!r}: {in_one_line(error)}{hint}") from error
    except Exception as error:
        if address is None and named is None:
            raise
        message = " ".join(str(error).split())
        raise InputError(f"joining {named or address!r} failed: {type(error).__name__}: {message}") from error


def _knock(address: str) -> None:
    """See that somebody listens at an address."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_TIMEOUT).close()


def _check_address(address: str | None) -> None:
    """See that an address is that of the session that this process is in, and that this is on a machine of its own."""
    if ray.util.client.ray.is_connected():
        raise InputError(f"this process is in a session of Ray Client: {_NO_CLIENT}")
    if address is None or address == "auto":
        return
    own = ray.get_runtime_context().gcs_address
    if not _is_same(address, own):
        raise InputError(
            f"address is {address!r}, but this process is in the Ray session at {own}: leave address out, or call "
            "ray.shutdown() first"
        )


def _is_same(address: str, session: str) -> bool:
    """Whether an address is that of a session, however its host is written."""
    (host, _, port), (own_host, _, own_port) = address.rpartition(":"), session.rpartition(":")
    return port == own_port and (host == own_host or _ip(host) == _ip(own_host))


def _ip(host: str) -> str:
    """The address of a host by which other machines know it; the text itself where there is none."""
    try:
        found = socket.gethostbyname(host)
    except OSError:
        return host
    return str(ray.util.get_node_ip_address()) if found.startswith("127.") else found
