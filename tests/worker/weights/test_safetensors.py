"""What is wrong with a model folder is named, and nothing is half-loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from services.worker.load import load_model
from services.worker.models.config import ModelError
from tests.worker.models.tiny import save, tiny_model

NORM = "model.norm.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model("LlamaForCausalLM"), tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load((folder / "model.safetensors").read_bytes())
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop(GATE))
    refused(folder, f"1 tensor missing from the checkpoint: {GATE}")


def test_many_missing_tensors_are_counted_and_a_few_named(folder: Path) -> None:
    edit(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.2" in name])
    refused(folder, r"9 tensors missing .*model\.layers\.2\.input_layernorm\.weight.* and 5 more")


def test_an_unknown_tensor_is_named(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update(extra=torch.zeros(1)))
    refused(folder, "1 tensor in the checkpoint that this model does not have: extra")


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({NORM: torch.ones(47)}))
    refused(folder, rf"{NORM} is \[47\], must be \[48\]")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_named(folder: Path, value: float) -> None:
    edit(folder, lambda tensors: tensors[GATE][3].fill_(value))
    refused(folder, f"tensor {GATE} holds NaN or infinity")


def test_a_value_too_large_for_float16_is_refused_in_float16_only(folder: Path) -> None:
    edit(folder, lambda tensors: tensors[NORM][0].fill_(1e6))
    load_model(folder)
    with pytest.raises(ModelError, match="float16"):
        load_model(folder, dtype="float16")


def test_an_integer_tensor_is_refused(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({NORM: torch.ones(48, dtype=torch.int32)}))
    refused(folder, f"tensor {NORM}: torch.int32 is not supported")


def test_redundant_tensors_of_older_checkpoints_are_ignored(tmp_path: Path) -> None:
    folder = save(tiny_model("LlamaForCausalLM", tie_word_embeddings=True), tmp_path)
    edit(
        folder,
        lambda tensors: tensors.update(
            {
                "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
            }
        ),
    )
    weights = load_model(folder).decoder.weights
    assert weights.head is weights.embedding


def test_a_truncated_file_is_refused(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(folder, "model.safetensors cannot be read")


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "has no model.safetensors")


def test_a_shard_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    folder = save(tiny_model("LlamaForCausalLM"), tmp_path, max_shard_size="100KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    refused(folder, f"has no {shard.name}")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../secret.safetensors"}}, "'../secret.safetensors' is not a file name"),
        ({"weight_map": {}}, "weight_map must be an object"),
        ({"metadata": {}}, "weight_map must be an object"),
    ],
)
def test_a_malformed_index_is_refused(folder: Path, index: object, message: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, message)


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "again.safetensors")
    weight_map = {"a": "model.safetensors", "b": "again.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, "is in two files")


def test_a_config_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    refused(folder, "config.json is not a JSON object")


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [([5, 6], 2, (5, 6)), (5, [2, 3], (5,)), (None, [2, 3], (2, 3)), (None, None, ())],
)
def test_end_tokens_come_from_the_generation_config_first(
    folder: Path, generation: object, config: object, expected: tuple[int, ...]
) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"eos_token_id": config}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert load_model(folder).eos_token_ids == expected


@pytest.mark.parametrize("ids", ["</s>", [2, 300], -1, [None]])
def test_end_tokens_outside_the_vocabulary_are_refused(folder: Path, ids: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    refused(folder, "eos_token_id must be token ids below 300")
