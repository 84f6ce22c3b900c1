from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from services.worker import fingerprint
from services.worker.fingerprint import files_digest, model_fingerprint
from services.worker.models.random import TINY
from services.worker.models.spec import ModelSpec

SPEC = ModelSpec.from_config(TINY)
FP32 = torch.float32


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "CHUNK_BYTES", 100)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("position", [0, 99, 100, 250, 349])
def test_one_changed_byte_anywhere_changes_the_digest(tmp_path: Path, position: int) -> None:
    file = tmp_path / "weights"
    data = bytearray(range(256)) + bytearray(94)
    file.write_bytes(data)
    before = files_digest([file])
    assert files_digest([file]) == before
    data[position] ^= 1
    file.write_bytes(data)
    assert files_digest([file]) != before


@pytest.mark.usefixtures("small_chunks")
def test_the_same_bytes_split_elsewhere_are_another_digest(tmp_path: Path) -> None:
    for name, data in {"a": b"x" * 100, "b": b"x" * 200, "c": b"x" * 300}.items():
        (tmp_path / name).write_bytes(data)
    a, b, c = (tmp_path / name for name in "abc")
    digests = {files_digest(files) for files in ([a, b], [b, a], [c], [a, a, a])}
    assert len(digests) == 4


def test_the_name_of_a_file_does_not_matter(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(b"the same")
    assert files_digest([tmp_path / "one"]) == files_digest([tmp_path / "two"])


def test_everything_that_kv_depends_on_changes_the_fingerprint() -> None:
    base = model_fingerprint(b"weights", SPEC, FP32, FP32)
    assert len(base) == 16
    rope = dataclasses.replace(SPEC.rope, attention_factor=1.1)
    others = [
        model_fingerprint(b"other weights", SPEC, FP32, FP32),
        model_fingerprint(b"weights", dataclasses.replace(SPEC, rope=rope), FP32, FP32),
        model_fingerprint(b"weights", dataclasses.replace(SPEC, windows=(8, 8, 8)), FP32, FP32),
        model_fingerprint(b"weights", SPEC, torch.bfloat16, FP32),
        model_fingerprint(b"weights", SPEC, FP32, torch.bfloat16),
    ]
    assert len({base, *others}) == 6


def test_a_new_layout_version_changes_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    base = model_fingerprint(b"weights", SPEC, FP32, FP32)
    monkeypatch.setattr(fingerprint, "KV_LAYOUT_VERSION", 2)
    assert model_fingerprint(b"weights", SPEC, FP32, FP32) != base
