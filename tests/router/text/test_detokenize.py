import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.text.detokenize import ByteDetokenizer, WindowDetokenizer, make_detokenizer
from services.router.text.tokenizer import Tokenizer
from tests.router.text.tokenizers import SAMPLE, TEXTS, byte_level, sentencepiece

BYTE_LEVEL, SENTENCEPIECE = (
    Tokenizer(made.to_str().encode(), made.get_vocab_size()) for made in (byte_level(), sentencepiece())
)
BOTH = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["bytes", "window"])


def pieces(detokenizer, ids):
    return [*(detokenizer.feed(token) for token in ids), detokenizer.finish()]


def test_each_kind_of_tokenizer_gets_its_detokenizer():
    assert isinstance(make_detokenizer(BYTE_LEVEL, []), ByteDetokenizer)
    assert isinstance(make_detokenizer(SENTENCEPIECE, []), WindowDetokenizer)


@BOTH
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    out = pieces(make_detokenizer(tokenizer, []), ids)
    assert "".join(out) == tokenizer.decode(ids)
    assert "".join(out).strip() == text.strip()
    assert all("\ufffd" not in piece for piece in out)


@BOTH
def test_no_piece_ever_ends_in_half_a_character(tokenizer):
    """Byte for byte: what is out is always a prefix of the text in whole characters."""
    text = "a👩‍👩‍👧‍👦ü"
    out = ""
    detokenizer = make_detokenizer(tokenizer, [])
    for token in tokenizer.encode(text):
        out += detokenizer.feed(token)
        assert text.startswith(out)
    assert out == text


@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=80))
@settings(max_examples=200, deadline=None)
def test_any_byte_level_tokens_give_what_decoding_them_at_once_gives(ids):
    assert "".join(pieces(make_detokenizer(BYTE_LEVEL, []), ids)) == BYTE_LEVEL.decode(ids)


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_in_sentencepiece_comes_back_whole(text):
    ids = SENTENCEPIECE.encode(text)
    assert "".join(pieces(make_detokenizer(SENTENCEPIECE, []), ids)) == SENTENCEPIECE.decode(ids)


@BOTH
def test_a_character_that_never_completes_becomes_a_replacement_at_the_end(tokenizer):
    first, *_, last = tokenizer.encode("\U0001fae8")[-4:]  # in no vocabulary: spelt in bytes
    assert pieces(make_detokenizer(tokenizer, []), [first]) == ["", "\ufffd"]
    assert make_detokenizer(tokenizer, []).feed(first) == ""
    assert "\ufffd" in "".join(pieces(make_detokenizer(tokenizer, []), [first, last]))


def test_endless_broken_bytes_come_out_without_waiting_for_the_end():
    (byte,) = SENTENCEPIECE.encode("\xff")[-1:]
    detokenizer = make_detokenizer(SENTENCEPIECE, [])
    out = "".join(detokenizer.feed(byte) for _ in range(50))
    assert out.count("\ufffd") > 40


def test_sentencepiece_keeps_the_space_between_prompt_and_answer():
    (word,) = SENTENCEPIECE.encode("the")
    assert "".join(pieces(make_detokenizer(SENTENCEPIECE, [word]), [word])) == " the"
    assert "".join(pieces(make_detokenizer(SENTENCEPIECE, []), [word])) == "the"


def test_a_window_stays_short_however_long_the_text():
    detokenizer = make_detokenizer(SENTENCEPIECE, SENTENCEPIECE.encode("hello world"))
    seen = []
    decode, SENTENCEPIECE.decode = SENTENCEPIECE.decode, lambda ids: seen.append(len(ids)) or decode(ids)
    try:
        for token in SENTENCEPIECE.encode(SAMPLE * 5):
            detokenizer.feed(token)
    finally:
        del SENTENCEPIECE.decode
    assert max(seen) <= 12
