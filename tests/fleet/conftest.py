"""A private Ray for the tests of this folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.launch.local_ray import local_ray, ray_environment

# Ray reads some of these when it is imported, which the test modules do.
os.environ.update(ray_environment())
os.environ["RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S"] = "0.5"  # 10 s by default


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    with (
        tempfile.TemporaryDirectory(prefix="reprise-test-", ignore_cleanup_errors=True) as directory,
        local_ray(Path(directory)) as address,
    ):
        yield address
