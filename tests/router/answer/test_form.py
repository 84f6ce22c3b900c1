"""What a grammar of an answer lets through, byte by byte, and what it does not."""

import json

import pytest
from llguidance import LLMatcher, LLTokenizer

from services.router.answer import form
from services.router.answer.families import CALL_STYLES, Family
from services.router.answer.form import Function, answer_grammar, calls_body, free_calls_body, json_body
from services.router.answer.parser import AnswerParser
from services.router.answer.pieces import Call
from tests.fakes.text import EOS, FAKE_VOCAB, IM_END, IM_START, byte_text_assets

TOKENIZER = LLTokenizer(byte_text_assets().tokenizer.decode(), n_vocab=FAKE_VOCAB, eos_token=[EOS])
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
}
FUNCTIONS = [
    Function("point", json_body(POINT, strict=True)),
    Function('"odd"', json_body({"type": "object"}, strict=False)),
]
NONE = {}
SPECIAL = {"<tool_call>": IM_START, "[TOOL_CALLS]": IM_START, "</think>": IM_END}


def follows(grammar, answer):
    """Whether the answer, text and special tokens, is whole by the grammar."""
    matcher = LLMatcher(TOKENIZER, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = []
    for part in answer if isinstance(answer, tuple) else (answer,):
        tokens += part.encode() if isinstance(part, str) else [part]
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def grammar(*bodies, thinking="none", special=NONE):
    return answer_grammar(bodies, thinking, special)


def test_json_fits_its_schema_and_its_white_space_is_bounded():
    point = grammar(json_body(POINT, strict=True))
    assert follows(point, '{"x": 1}')
    assert follows(point, json.dumps({"x": 1, "y": -2}, indent=4))
    for wrong in ('{"y": 1}', '{"x": "1"}', '{"x": 1, "z": 1}', '{"x": 1} ', "{\n\n\n", '{"x":  1}'):
        assert not follows(point, wrong)


def test_texts_of_other_forms():
    assert follows(grammar(form.regex_body(r"[a-z]+/\d")), "ab/7")
    assert not follows(grammar(form.regex_body("a|b")), "ab")
    choice = grammar(form.choice_body(["yes", "no\n\"'\\", "ü"]))
    assert all(follows(choice, text) for text in ("yes", "no\n\"'\\", "ü"))
    assert not follows(choice, "y")
    assert follows(grammar(form.grammar_body('root ::= "a" x\nx ::= [0-9]+')), "a12")
    assert follows(grammar(form.grammar_body('start: "a" B\nB: /[0-9]+/')), "a12")


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: json_body({"type": "thing"}, strict=False), "thing"),
        (lambda: json_body({"not": {"type": "string"}}, strict=True), "not"),
        (lambda: form.regex_body("(a"), "regex"),
        (lambda: form.grammar_body("start: nothing"), "nothing"),
        (lambda: form.grammar_body("root ::= nothing"), "nothing"),
        (lambda: form.choice_body(["a" * form.MAX_CHARS]), "characters"),
    ],
)
def test_what_is_no_form_says_why_in_a_line(make, word):
    with pytest.raises(form.FormError, match=word) as error:
        make()
    assert "\n" not in str(error.value)


def test_what_cannot_be_enforced_is_ignored_unless_strict():
    assert follows(grammar(json_body({"not": {"type": "string"}}, strict=False)), "1")


# ---- calls

ONE = {
    "hermes": ('<tool_call>\n{"name": "point", "arguments": {"x": 1}}\n</tool_call>',),
    "llama": ('{"name": "point", "parameters": {"x": 1}}',),
    "mistral": ('[TOOL_CALLS][{"name": "point", "arguments": {"x": 1}}]',),
}
TWO = {
    "hermes": '<tool_call>\n{"name": "point", "arguments": {"x": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "\\"odd\\"", "arguments": {"a": []}}\n</tool_call>',
    "llama": '{"name": "point", "parameters": {"x": 1}}; {"name": "\\"odd\\"", "parameters": {"a": []}}',
    "mistral": '[TOOL_CALLS][{"name": "point", "arguments": {"x": 1}}, '
    '{"name": "\\"odd\\"", "arguments": {"a": []}}]',
}


@pytest.mark.parametrize("style", CALL_STYLES)
def test_calls_are_written_as_the_parser_of_the_family_reads_them(style):
    one, two = ONE[style][0], TWO[style]
    several = grammar(calls_body(FUNCTIONS, style, NONE, several=True))
    assert follows(several, one)
    assert follows(several, two)
    single = grammar(calls_body(FUNCTIONS, style, NONE, several=False))
    assert follows(single, one)
    assert not follows(single, two)
    named = grammar(calls_body(FUNCTIONS[1:], style, NONE, several=False))
    assert not follows(named, one)
    for wrong in ("hello", one.replace("1", '"1"'), one.replace("point", "pint"), one + " and"):
        assert not follows(several, wrong)
    parser = AnswerParser(calls=Family(style, False).call_parser(["point", '"odd"']))
    pieces = parser.feed(two) + parser.finish()
    assert [piece.name for piece in pieces if isinstance(piece, Call)] == ["point", '"odd"']
    assert len(pieces) == 4


@pytest.mark.parametrize("style", CALL_STYLES)
def test_free_text_may_call_but_only_what_there_is(style):
    free = grammar(free_calls_body(FUNCTIONS, style, NONE))
    one, two = ONE[style][0], TWO[style]
    for right in ("", "Hello { [", " \n", one, two):
        assert follows(free, right)
    for wrong in (one.replace("1", '"1"'), one.replace("point", "pint")):
        assert not follows(free, wrong)
    if style != "llama":
        assert follows(free, f"I look. {one} Then {one}\n")


@pytest.mark.parametrize("style", ["hermes", "mistral"])
def test_marks_that_are_special_tokens_go_by_their_id(style):
    mark = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]"}[style]
    one = ONE[style][0]
    by_id = (IM_START, one.removeprefix(mark))
    forced = grammar(calls_body(FUNCTIONS, style, SPECIAL, several=True))
    assert follows(forced, by_id)
    assert not follows(forced, one)
    free = grammar(free_calls_body(FUNCTIONS, style, SPECIAL))
    assert follows(free, ("Well. ", *by_id, " So."))
    assert not follows(free, (IM_START, one.removeprefix(mark).replace("point", "pint")))


# ---- thoughts


@pytest.mark.parametrize("special", [NONE, SPECIAL])
def test_thoughts_are_free_and_the_answer_after_them_is_not(special):
    end = special.get("</think>", "</think>")
    point = json_body(POINT, strict=True)
    begun = grammar(point, thinking="begun", special=special)
    assert follows(begun, ("Hm {} <b>\n", end, '\n\n{"x": 1}'))
    assert not follows(begun, '{"x": 1}')
    assert not follows(begun, ("Hm", end, "Well"))
    possible = grammar(point, thinking="possible", special=special)
    assert follows(possible, ("<think>\nHm", end, '\n\n{"x": 1}'))
    assert follows(possible, '{"x": 1}')
    assert not follows(possible, "Hm")


def test_an_answer_may_be_calls_or_a_document():
    either = grammar(calls_body(FUNCTIONS, "hermes", NONE, several=True), json_body(POINT, strict=True))
    assert follows(either, ONE["hermes"][0])
    assert follows(either, '{"x": 1}')
    assert not follows(either, "Hello")
