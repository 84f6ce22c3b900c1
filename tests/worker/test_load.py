from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from services.worker.load import load_model
from services.worker.models.config import ModelError
from tests.worker.models.tiny import save, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model("LlamaForCausalLM"), tmp_path_factory.mktemp("models") / "tiny-llama")


def test_a_model_comes_with_everything_that_its_card_says(folder: Path) -> None:
    model = load_model(folder)
    card = model.card
    assert (card.name, card.vocab_size, card.max_model_len, card.eos_token_ids) == (
        "tiny-llama",
        300,
        256,
        (2,),
    )
    assert card.fingerprint == model.fingerprint
    assert card.text_digest == model.text_digest
    assert len(card.fingerprint) == len(card.text_digest) == 16
    assert model.kv_dtype == torch.float32


def test_the_kv_dtype_is_part_of_the_fingerprint_and_the_length_limit_is_not(folder: Path) -> None:
    base = load_model(folder)
    shorter, half = load_model(folder, max_model_len=100), load_model(folder, kv_dtype="bfloat16")
    assert base.fingerprint == shorter.fingerprint != half.fingerprint
    assert shorter.max_model_len == 100
    assert half.decoder.dtype == torch.float32
    assert half.kv_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"kv_dtype": "fp8"}, "kv_dtype must be one of"),
        ({"device": "gpu"}, "device must be cpu or cuda"),
        ({"device": "cuda:64"}, "device cuda:64 is not there: PyTorch sees"),
        ({"max_model_len": 0}, "max_model_len must be from 1 to 256, got 0"),
        ({"max_model_len": 257}, "max_model_len must be from 1 to 256, got 257"),
    ],
)
def test_an_option_out_of_range_is_refused(folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(folder, **options)  # type: ignore[arg-type]


def test_a_gpu_takes_no_float32(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ModelError, match="dtype float32 is for the CPU"):
        load_model(folder, device="cuda", dtype="float32")


def test_a_gpu_machine_needs_no_gguf_ray_redis_or_web_server() -> None:
    """Design §8: the engine imports with torch, triton, safetensors and tokenizers alone."""
    code = "import sys, services.worker.load, services.worker.models.random; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"gguf", "ray", "redis", "fastapi", "transformers"}.isdisjoint(loaded.stdout.split())


def test_a_path_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"must be a \.gguf file or a folder"):
        load_model(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(ModelError, match=r"must be a \.gguf file or a folder"):
        load_model(tmp_path / "a.txt")
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ModelError, match=r"one \.gguf file"):
        load_model(tmp_path)


def test_a_folder_with_one_gguf_file_is_that_model(demo_model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").symlink_to(demo_model_path)
    model = load_model(tmp_path)
    assert model.name == "a"
    assert model.spec.layers == 30
