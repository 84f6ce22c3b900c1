from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Report = dict[str, int]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """What every shipped kernel takes on sm_90, by name; compiled anew, where nothing is interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    return {report.pop("name"): report for report in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
def test_no_shipped_kernel_spills_or_exceeds_the_limits_of_an_h100(reports: dict[str, Report]) -> None:
    assert len(reports) >= 16
    for name, report in reports.items():
        assert (report["stack_bytes"], report["local_bytes"]) == (0, 0), name
        assert report["registers"] <= 255, name
        assert report["shared_bytes"] <= 227 * 1024, name


@pytest.mark.slow
def test_attention_runs_on_tensor_cores_and_large_tiles_on_wgmma(reports: dict[str, Report]) -> None:
    attention = {name: report for name, report in reports.items() if name.startswith("attention-")}
    for name, report in attention.items():
        small = name.endswith("-16")
        assert (report["wgmma"] == 0) == small, name
        assert (report["mma_sync"] > 0) == small, name
    assert sum(name.endswith("-128") for name in attention) >= 5
