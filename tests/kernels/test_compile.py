from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.tuned import sm90

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
    for kind, least, wgmma in (("decode", 12, False), ("shared", 6, True), ("prefill", 24, True)):
        names = [name for name in reports if name.startswith(f"attention-{kind}-")]
        assert len(names) >= least
        for name in names:
            assert (reports[name]["wgmma"] > 0, reports[name]["mma_sync"] > 0) == (wgmma, not wgmma), name


@pytest.mark.slow
def test_the_programs_of_decode_attention_fit_the_device_at_the_same_time(reports: dict[str, Report]) -> None:
    for name in (name for name in reports if name.startswith("attention-decode-")):
        tile = sm90.decode_tile({"smollm2": 64, "phi3": 96, "gemma3": 256}.get(name.split("-")[2], 128))
        at_once = tile.programs_per_sm
        assert at_once * (reports[name]["shared_bytes"] + 1024) <= 228 * 1024, name
        assert at_once * tile.warps * 32 * reports[name]["registers"] <= 65536, name


@pytest.mark.slow
def test_the_decode_gemm_runs_on_wgmma_from_64_rows_on(reports: dict[str, Report]) -> None:
    gemm = {name: report for name, report in reports.items() if name.startswith("gemm-")}
    assert len(gemm) >= 20
    for name, report in gemm.items():
        rows = int(name.split("-")[-1].split("x")[0])
        assert (report["wgmma"] > 0, report["mma_sync"] > 0) == (rows >= 64, rows < 64), name


@pytest.mark.slow
def test_no_copy_lands_in_a_stage_that_wgmma_still_reads(reports: dict[str, Report]) -> None:
    """Triton 3.6 has no spare stage for the input of a decode GEMM that norms it: its product must have
    ended before the next copy starts. (Without the norm there is a spare one, and one product may run on.)"""
    norming = [name for name in reports if name.startswith("gemm-norm-")]
    assert len(norming) >= 10
    for name in norming:
        assert reports[name]["wgmma_left_running"] == 0, name


@pytest.mark.slow
def test_enough_programs_of_the_samplers_first_pass_read_at_the_same_time(reports: dict[str, Report]) -> None:
    chunks = {name: report for name, report in reports.items() if name.startswith("sample-chunks-")}
    assert len(chunks) == 5
    for name, report in chunks.items():
        assert report["registers"] <= 40, name  # six of 256 threads on an SM
