"""A private Ray for the tests of this folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.launch.local_ray import local_ray, ray_environment

CHANNEL_SECRET = b"the secret of the tests in this folder"

# Ray reads some of these when it is imported, which the test modules do.
os.environ.update(ray_environment())


@pytest.fixture(scope="package")
def ray_address() -> Iterator[str]:
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="reprise-test-", dir="/tmp", ignore_cleanup_errors=True) as folder,
    ):
        patch.setenv("REPRISE_CHANNEL_SECRET", CHANNEL_SECRET.decode())  # what replicas inherit
        with local_ray(Path(folder)) as address:
            yield address
