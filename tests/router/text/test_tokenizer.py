import pytest

from services.router.text.model_text import ModelText
from services.router.text.tokenizer import Tokenizer
from services.wire.messages import TextAssets
from tests.router.text.tokenizers import TEXTS, byte_level, sentencepiece


def wrap(tokenizer):
    return Tokenizer(tokenizer.to_str().encode(), tokenizer.get_vocab_size() + 3)


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("text", TEXTS)
def test_encodes_as_the_library_does(make, text):
    theirs = make()
    assert wrap(theirs).encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_special_tokens_written_out_count_as_such_and_are_skipped_in_text():
    ours = wrap(byte_level())
    ids = ours.encode("<s>hello</s>")
    assert ids[0] in ours.special_ids
    assert ids[-1] in ours.special_ids
    assert ours.decode(ids) == "hello"


def test_every_byte_level_token_is_its_bytes():
    ours = wrap(byte_level())
    for text in TEXTS:
        ids = ours.encode(text)
        assert b"".join(ours.one_token(token) for token in ids) == text.encode()


def test_tokens_beyond_the_vocabulary_have_no_bytes():
    ours = wrap(byte_level())
    assert ours.one_token(ours.vocab_size - 1) == b""


def test_special_tokens_are_shown_by_name_in_logprobs():
    ours = wrap(byte_level())
    (token,) = ours.encode("</s>")
    assert ours.one_token(token) == b"</s>"


def test_sentencepiece_has_no_table_but_names_its_tokens():
    ours = wrap(sentencepiece())
    assert ours.text_bytes is None
    assert ours.one_token(ours.encode("the")[0]) == b"the"


def test_starts_are_character_positions():
    ours = wrap(byte_level())
    text = "große 🎉 fox"
    ids, starts = ours.encode_with_starts(text)
    assert ids == ours.encode(text)
    assert starts == sorted(starts)
    assert starts[0] == 0
    assert text[starts[-1] :].strip() in "fox"


def test_an_unreadable_document_is_refused_with_a_reason():
    with pytest.raises(ValueError, match="the worker's tokenizer cannot be read"):
        Tokenizer(b"{}", 10)


def test_raw_prompts_begin_with_bos_once_where_the_model_wants_it():
    document = byte_level().to_str().encode()
    text = ModelText(
        TextAssets(tokenizer=document, chat_template=None, bos_token="<s>", add_bos=True), vocab_size=450
    )
    once = text.encode_prompt("hello")
    assert once[0] == text.tokenizer.token_id("<s>")
    assert text.encode_prompt("<s>hello") == once
    without = ModelText(TextAssets(tokenizer=document, chat_template=None, bos_token="<s>"), vocab_size=450)
    assert without.encode_prompt("hello") == once[1:]
