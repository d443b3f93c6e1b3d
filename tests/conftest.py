"""One Ray session for all tests of a run: it takes ten seconds to start."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from paths import PYTHONPATH, TESTS

sys.path.extend(TESTS)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[str]:
    """A Ray session of two CPUs; its address, for further drivers."""
    import ray

    # snapshots of an experiment several times a second, so that restores have something to begin from
    settings = {"TUNE_GLOBAL_CHECKPOINT_S": "0.2", "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    context = ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": PYTHONPATH}}
    )
    try:
        yield context.address_info["gcs_address"]
    finally:
        ray.shutdown()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
