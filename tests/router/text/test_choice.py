from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.text.choice import Choice
from services.router.text.logprobs import IMPOSSIBLE, chat_logprobs, completion_logprobs
from services.router.text.model_text import ModelText
from services.wire.messages import Finish, Logprob, StepItem
from tests.fakes import EOS, byte_text_assets

TEXT = ModelText(byte_text_assets(), 260)


def choice(*stops):
    return Choice(TEXT.detokenizer([]), stops)


def step(text, finish=None, logprobs=False):
    tokens = tuple(text.encode())
    values = tuple(Logprob(-0.25, ((token, -0.25), (0, -3.0))) for token in tokens) if logprobs else ()
    return StepItem(1, tokens, logprobs=values, finish=Finish(finish) if finish else None)


def test_without_stops_text_comes_as_fed():
    one = choice()
    assert one.feed(step("Hel")) == "Hel"
    assert one.feed(step("lo", "length")) == "lo"
    assert (one.finish_reason, one.completion_tokens) == ("length", 5)


def test_a_half_character_comes_out_with_its_other_half():
    one = choice()
    first, second = "ü".encode()
    assert one.feed(StepItem(1, (first,))) == ""
    assert one.feed(StepItem(1, (second,))) == "ü"


def test_a_half_character_at_the_end_becomes_a_replacement():
    one = choice()
    assert one.feed(StepItem(1, ("ü".encode()[0],), finish=Finish("length"))) == "\ufffd"


def test_special_tokens_count_and_do_not_show():
    one = choice()
    assert one.feed(StepItem(1, (65, EOS, 66))) == "AB"
    assert one.completion_tokens == 3


def test_a_stop_string_ends_the_choice_and_counts_its_own_tokens_only():
    one = choice("END")
    assert one.feed(step("abE")) == "ab"
    assert one.finish_reason is None
    assert one.feed(step("NDxyz")) == ""
    assert (one.finish_reason, one.completion_tokens) == ("stop", 5)


def test_what_was_held_back_comes_out_at_the_end():
    one = choice("END")
    assert one.feed(step("abEN")) == "ab"
    assert one.feed(step("", "stop")) == "EN"
    assert one.finish_reason == "stop"


def test_a_stop_string_in_the_last_step_wins_over_length():
    one = choice("END")
    assert one.feed(step("aEND", "length")) == "a"
    assert one.finish_reason == "stop"


@given(st.text("abcE N", max_size=30), st.lists(st.integers(1, 5), min_size=40, max_size=40))
@settings(max_examples=200, deadline=None)
def test_logprobs_go_out_with_their_text_and_none_of_the_stop_strings(text, sizes):
    one = choice("EN")
    out, logprobs = "", []
    rest = text
    for size in sizes:
        part, rest = rest[:size], rest[size:]
        out += one.feed(step(part, None if rest else "length", logprobs=True))
        logprobs += one.take_logprobs()
        assert sum(len(chr(item.token)) for item in logprobs) == len(out)
        if one.finish_reason:
            break
    assert "".join(chr(item.token) for item in logprobs) == out == text.split("EN")[0]
    assert [item.text_offset for item in logprobs] == list(range(len(out)))


def test_both_openai_forms_carry_text_bytes_and_alternatives():
    one = choice()
    one.feed(step("ü", "stop", logprobs=True))
    tokens = one.take_logprobs()
    chat = chat_logprobs(tokens, TEXT.tokenizer)
    assert [entry["bytes"] for entry in chat["content"]] == [[0xC3], [0xBC]]
    assert chat["content"][0]["token"] == "\ufffd"
    assert chat["content"][0]["top_logprobs"][1] == {"token": "\x00", "logprob": -3.0, "bytes": [0]}
    text = completion_logprobs(tokens, TEXT.tokenizer)
    assert text["token_logprobs"] == [-0.25, -0.25]
    assert text["top_logprobs"][0] == {"\ufffd": -0.25, "\x00": -3.0}
    assert text["text_offset"] == [0, 0]


def test_impossible_tokens_have_a_finite_logprob():
    one = choice()
    one.feed(StepItem(1, (65,), logprobs=(Logprob(float("-inf"), ((66, float("-inf")),)),)))
    tokens = one.take_logprobs()
    assert chat_logprobs(tokens, TEXT.tokenizer)["content"][0]["logprob"] == IMPOSSIBLE
    assert completion_logprobs(tokens, TEXT.tokenizer)["top_logprobs"] == [{"B": IMPOSSIBLE}]


def test_tokens_that_read_the_same_keep_the_likelier_logprob():
    one = choice()
    one.feed(StepItem(1, (65,), logprobs=(Logprob(-1.0, ((0xC3, -1.0), (0xC4, -2.0))),)))
    assert completion_logprobs(one.take_logprobs(), TEXT.tokenizer)["top_logprobs"] == [{"\ufffd": -1.0}]
