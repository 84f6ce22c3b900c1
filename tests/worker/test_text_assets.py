from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, processors

from services.worker.models.config import ModelError
from services.worker.text_assets import text_assets_from_directory, text_digest


def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "<s>": 1, "</s>": 2}, merges=[]))
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, **files: Any) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, fields in files.items():
        (folder / f"{name}.json").write_text(json.dumps(fields))
    return folder


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def test_special_tokens_template_and_defaults_are_read(tmp_path: Path) -> None:
    text = text_assets_from_directory(
        write(
            tmp_path,
            tokenizer(),
            tokenizer_config={
                "bos_token": "<s>",
                "eos_token": {"content": "</s>", "special": True},
                "chat_template": "{{ messages }}",
            },
            generation_config={"temperature": 0.6, "top_k": 20, "do_sample": True, "eos_token_id": 2},
        )
    )
    assert (text.bos_token, text.eos_token, text.chat_template) == ("<s>", "</s>", "{{ messages }}")
    assert text.generation_defaults == {"temperature": 0.6, "top_k": 20.0}
    assert text.add_bos is False


def test_special_tokens_map_fills_in_what_tokenizer_config_lacks(tmp_path: Path) -> None:
    write(tmp_path, tokenizer(), special_tokens_map={"eos_token": "</s>"})
    assert text_assets_from_directory(tmp_path).eos_token == "</s>"


def test_a_template_file_wins_over_the_config(tmp_path: Path) -> None:
    write(tmp_path, tokenizer(), tokenizer_config={"chat_template": "config"})
    (tmp_path / "chat_template.jinja").write_text("file")
    assert text_assets_from_directory(tmp_path).chat_template == "file"


def test_the_default_of_named_templates_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write(tmp_path, tokenizer(), tokenizer_config={"chat_template": named})
    assert text_assets_from_directory(tmp_path).chat_template == "plain"


@pytest.mark.parametrize(
    ("bos_in_tokenizer", "fields", "expected"),
    [
        (True, {"bos_token": "<s>"}, True),
        (False, {"bos_token": "<s>"}, False),
        (False, {"bos_token": "<s>", "add_bos_token": True}, True),
        (True, {"bos_token": "<s>", "add_bos_token": False}, False),
        (True, {}, False),
        (False, {"add_bos_token": True}, False),
    ],
)
def test_bos_is_added_as_the_config_says_or_else_as_the_tokenizer_does(
    tmp_path: Path, bos_in_tokenizer: bool, fields: dict[str, Any], expected: bool
) -> None:
    made = with_bos(tokenizer()) if bos_in_tokenizer else tokenizer()
    text = text_assets_from_directory(write(tmp_path, made, tokenizer_config=fields))
    assert text.add_bos is expected


def test_the_tokenizer_handed_out_adds_and_cuts_nothing(tmp_path: Path) -> None:
    made = with_bos(tokenizer())
    made.enable_truncation(4)
    made.enable_padding(length=64, pad_token="</s>", pad_id=2)
    text = text_assets_from_directory(write(tmp_path, made))
    assert Tokenizer.from_str(text.tokenizer.decode()).encode("a" * 10).ids == [0] * 10


@pytest.mark.parametrize("bos_in_tokenizer", [True, False])
def test_a_folder_that_transformers_saved_gives_the_tokens_of_transformers(
    tmp_path: Path, bos_in_tokenizer: bool
) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    made = with_bos(tokenizer()) if bos_in_tokenizer else tokenizer()
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(
        tmp_path
    )
    text = text_assets_from_directory(tmp_path)
    ours = Tokenizer.from_str(text.tokenizer.decode())
    prompt = (text.bos_token or "") + "aa" if text.add_bos else "aa"
    assert ours.encode(prompt).ids == AutoTokenizer.from_pretrained(tmp_path)("aa").input_ids


def test_a_folder_without_tokenizer_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        text_assets_from_directory(tmp_path)


def test_a_tokenizer_json_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a tokenizer"):
        text_assets_from_directory(tmp_path)


def test_a_malformed_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, tokenizer(), tokenizer_config=[])
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is not a JSON object"):
        text_assets_from_directory(tmp_path)


def test_the_digest_follows_every_field(tmp_path: Path) -> None:
    before = text_assets_from_directory(write(tmp_path, tokenizer()))
    same = text_assets_from_directory(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("new")
    after = text_assets_from_directory(tmp_path)
    assert text_digest(before) == text_digest(same) != text_digest(after)
