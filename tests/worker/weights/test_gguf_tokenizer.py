"""Tokenizers rebuilt from GGUF metadata against transformers and against SentencePiece itself."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from services.worker.models.config import ModelError
from services.worker.weights.gguf import GGUFCheckpoint
from services.worker.weights.gguf_tokenizer import build_tokenizer, text_assets_from_metadata
from tests.worker.weights.gguf_files import write_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"

#: Without digits: transformers does not know that SmolLM splits them (tested apart).
TEXTS = {
    "prose": topics["assignment"][:4000].translate({ord(d): "x" for d in "0123456789"}),
    "code": 'def f(self, *args):\n\treturn {"a": [args, None]}  # done\n\n\nclass A(B):\n    pass\r\n',
    "contractions": "I'm sure they'll say it's John's; we've DON'T'VE 'twas",
    "accents": "Les élèves mangent à Noël — Straße, cafe\u0301, İstanbul",
    "scripts": "你好，世界 こんにちは Привет שלום مرحبا नमस्ते 한국어",
    "emoji": "🦙🔥👩‍👩‍👧 ok🙂",
    "whitespace": "  a   b\t\tc \n \n\n  d\u00a0e\u3000f   ",
    "only spaces": "     ",
    "newlines": "\n\n\n\r\n",
    "punctuation": "...!!!???--- (a) [b] {c} <d> a@b.c #x $y %z ^ & * _ ` ~ | \\ /",
    "special": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "almost special": "<|im_start |> <im_end> <|im_<|im_end|>",
    "empty": "",
    "control characters": "a\x00b\x07c\x7f",
    "long word": "pneumono" * 40,
}
DIGITS = {
    "numbers": "1234567890 and 3.14159, 2024-01-31",
    "other numerals": "½ ² Ⅷ ٣٤ 12³",
    "next to letters": "a1b22c333d4444 x86_64",
}


@pytest.fixture(scope="module")
def demo(demo_model_path: Path) -> Tokenizer:
    return Tokenizer.from_str(GGUFCheckpoint(demo_model_path).text().tokenizer.decode())


@pytest.fixture(scope="module")
def demo_in_transformers(demo_model_path: Path) -> Any:
    return transformers_tokenizer(demo_model_path)


def transformers_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_the_demo_model_tokenises_as_in_transformers(
    demo: Tokenizer, demo_in_transformers: Any, name: str
) -> None:
    ids = demo.encode(TEXTS[name]).ids
    assert ids == demo_in_transformers.encode(TEXTS[name], add_special_tokens=False)
    assert demo.decode(ids) == demo_in_transformers.decode(ids, skip_special_tokens=True)


def test_smollm_splits_numbers_into_digits(demo: Tokenizer) -> None:
    """The model's own tokenizer.json puts each digit alone, before the byte-level split."""
    assert demo.encode("in 2024, 3.14").tokens == [
        "in",
        "Ġ",
        "2",
        "0",
        "2",
        "4",
        ",",
        "Ġ",
        "3",
        ".",
        "1",
        "4",
    ]


@pytest.mark.parametrize("text", [*TEXTS.values(), *DIGITS.values()], ids=[*TEXTS, *DIGITS])
def test_text_survives_the_round_trip(demo: Tokenizer, text: str) -> None:
    assert demo.decode(demo.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_are_single_tokens_and_vanish_from_decoded_text(demo: Tokenizer) -> None:
    ids = demo.encode("<|im_start|>user\nHi<|im_end|>").ids
    assert (ids[0], ids[-1]) == (1, 2)
    assert demo.decode(ids) == "user\nHi"


def test_the_demo_model_has_its_chat_template_and_adds_no_bos(demo_model_path: Path) -> None:
    text = GGUFCheckpoint(demo_model_path).text()
    assert text.chat_template is not None
    assert "<|im_start|>" in text.chat_template
    assert (text.bos_token, text.eos_token, text.add_bos) == ("<|im_start|>", "<|im_end|>", False)


def trained_byte_level(pre: pre_tokenizers.PreTokenizer) -> dict[str, Any]:
    """Metadata of a small byte-level vocabulary learned with `pre` from Python's own documentation."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([topics["assignment"], topics["formatstrings"], "12345 " * 50], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [" ".join(pair) for pair in model["merges"]]
    tokens += ["<|im_start|>", "<|im_end|>", "<think>"]
    types = [1] * (len(tokens) - 3) + [3, 3, 4]
    return {"tokens": tokens, "types": types, "merges": merges, "eos_token_id": len(tokens) - 2}


def metadata_of(fields: dict[str, Any], model: str = "gpt2") -> dict[str, Any]:
    renamed = {"token_type" if key == "types" else key: value for key, value in fields.items()}
    return {f"tokenizer.ggml.{key}": value for key, value in renamed.items()} | {
        "tokenizer.ggml.model": model
    }


@pytest.mark.parametrize("pre", ["qwen2", "default", "llama-bpe"])
def test_byte_level_vocabularies_tokenise_as_in_transformers(tmp_path: Path, pre: str) -> None:
    fields = trained_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)) | {"pre": pre}
    ours = build_tokenizer(metadata_of(fields))
    if pre == "qwen2":
        # transformers' conversion of GGUF drops the NFC normalisation that Qwen's tokenizer.json has.
        ours.normalizer = None
    theirs = transformers_tokenizer(write_tokenizer(tmp_path / "model.gguf", **fields))
    for text in [*TEXTS.values(), *DIGITS.values(), "a <think>b</think>"]:
        assert ours.encode(text).ids == theirs.encode(text, add_special_tokens=False), text


def test_qwen2_composes_accents_first() -> None:
    fields = trained_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)) | {"pre": "qwen2"}
    ours = build_tokenizer(metadata_of(fields))
    assert ours.encode("cafe\u0301").ids == ours.encode("caf\u00e9").ids


def test_llama3_takes_a_word_that_is_a_token_whole() -> None:
    """Its vocabulary holds words that its merges do not build; without the rule "abc" would be ab, c."""
    fields = {
        "tokens": [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "abc"],
        "types": [1] * 258,
        "merges": ["a b"],
    }
    for pre, expected in (("llama-bpe", ["abc"]), ("default", ["ab", "c"])):
        assert build_tokenizer(metadata_of(fields | {"pre": pre})).encode("abc").tokens == expected


@pytest.fixture(scope="module")
def sentencepiece() -> dict[str, Any]:
    """A vocabulary that SentencePiece trained, and its own encodings of some texts (see `made_by`)."""
    fixture: dict[str, Any] = json.loads((FIXTURES / "sentencepiece_bpe.json").read_text())
    return fixture


def sentencepiece_fields(fixture: dict[str, Any]) -> dict[str, Any]:
    ids = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {name: fixture[name] for name in ("tokens", "scores", "types")} | ids


def test_sentencepiece_vocabularies_tokenise_as_in_sentencepiece(sentencepiece: dict[str, Any]) -> None:
    ours = build_tokenizer(metadata_of(sentencepiece_fields(sentencepiece), "llama"))
    for text, expected in sentencepiece["encodings"]:
        assert ours.encode(text).ids == expected, text
        assert ours.decode(expected) == text.replace("▁", " ")


def test_sentencepiece_vocabularies_tokenise_as_in_transformers(
    tmp_path: Path, sentencepiece: dict[str, Any]
) -> None:
    fields = sentencepiece_fields(sentencepiece)
    ours = build_tokenizer(metadata_of(fields, "llama"))
    theirs = transformers_tokenizer(write_tokenizer(tmp_path / "model.gguf", model="llama", **fields))
    for text in [*TEXTS.values(), *DIGITS.values()]:
        # Here transformers is wrong: it adds no space in front of a text that starts with one.
        if not text.startswith(" "):
            assert ours.encode(text).ids == theirs.encode(text, add_special_tokens=False), text


def test_the_space_prefix_comes_after_every_special_token_too(sentencepiece: dict[str, Any]) -> None:
    """As in llama.cpp and in the tokenizer.json of Llama 2: each piece of text between them is a text."""
    ours = build_tokenizer(metadata_of(sentencepiece_fields(sentencepiece), "llama"))
    assert ours.encode("<s>the</s>the").tokens == ["<s>", "▁the", "</s>", "▁the"]


def test_sentencepiece_without_the_space_prefix_adds_none(sentencepiece: dict[str, Any]) -> None:
    fields = sentencepiece_fields(sentencepiece) | {"add_space_prefix": False}
    ours = build_tokenizer(metadata_of(fields, "llama"))
    assert "".join(ours.encode("the class").tokens) == "the▁class"
    assert ours.decode(ours.encode(" the class").ids) == " the class"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model": "llama"}, True),
        ({"model": "llama", "add_bos_token": False}, False),
        ({"model": "gpt2", "pre": "llama-bpe"}, True),
        ({"model": "gpt2", "pre": "qwen2"}, False),
        ({"model": "gpt2", "pre": "qwen2", "add_bos_token": True}, True),
        ({"model": "gpt2", "add_bos_token": True, "bos_token_id": None}, False),
    ],
)
def test_bos_is_added_as_the_file_says_or_else_as_its_kind_does(
    fields: dict[str, Any], expected: bool
) -> None:
    base = {"tokens": ["a", "<s>"], "token_type": [1, 3], "scores": [0.0, 0.0], "bos_token_id": 1}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in (base | fields).items()}
    assert text_assets_from_metadata(metadata).add_bos is expected


def test_sampling_recommended_in_the_file_becomes_the_defaults() -> None:
    metadata = metadata_of({"tokens": ["a"]}) | {"general.sampling.temp": 0.6, "general.sampling.top_k": 20}
    assert text_assets_from_metadata(metadata).generation_defaults == {"temperature": 0.6, "top_k": 20.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "bert"}, "GGUF tokenizer 'bert' is not supported; supported: gpt2, llama"),
        (
            {"model": "gpt2", "pre": "tekken"},
            "GGUF pre-tokenizer 'tekken' is not supported; supported: default",
        ),
        ({"model": "gpt2", "merges": ["a z"]}, "merges do not fit the vocabulary"),
        ({"model": "gpt2", "token_type": [1, 1]}, "token_type must have 1 entries, got 2"),
        ({"model": "llama"}, "scores must have 1 entries, got 0"),
        ({"model": "gpt2", "bos_token_id": 5}, "bos_token_id must be below 1, got 5"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in ({"tokens": ["a"]} | fields).items()}
    with pytest.raises(ModelError, match=message):
        text_assets_from_metadata(metadata)
