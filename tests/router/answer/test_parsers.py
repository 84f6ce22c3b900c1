"""Answers as the models' makers publish them, whole and cut at every place."""

import json
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.router.answer.hermes import HermesParser
from services.router.answer.llama import LlamaParser
from services.router.answer.mistral import MistralParser
from services.router.answer.parser import AnswerParser, thinking_after
from services.router.answer.pieces import Arguments, Call, Content, Thought, merged

NAMES = (
    "get_current_weather",
    "get_current_temperature",
    "get_stock_fundamentals",
    "spotify_trending_songs",
    "f",
)


def parsers():
    return {
        "hermes": HermesParser(),
        "llama": LlamaParser(NAMES),
        "mistral": MistralParser(),
        "thinking": AnswerParser("possible", HermesParser()),
    }


def read(parser, parts):
    pieces = [piece for part in parts for piece in parser.feed(part)]
    return merged(pieces + parser.finish())


def parse(style, text):
    """(content, [(name, arguments)], thoughts); the same however the text is cut."""
    whole = read(parsers()[style], [text])
    assert read(parsers()[style], text) == whole, "character by character"
    for cut in range(len(text)):
        assert read(parsers()[style], [text[:cut], text[cut:]]) == whole
    content = "".join(piece.text for piece in whole if isinstance(piece, Content))
    thoughts = "".join(piece.text for piece in whole if isinstance(piece, Thought))
    calls = [piece for piece in whole if isinstance(piece, Call)]
    assert [call.index for call in calls] == list(range(len(calls)))
    arguments = [
        "".join(p.text for p in whole if isinstance(p, Arguments) and p.index == c.index) for c in calls
    ]
    return content, [(c.name, a) for c, a in zip(calls, arguments, strict=True)], thoughts


PUBLISHED = {
    # https://github.com/NousResearch/Hermes-Function-Calling, README
    "hermes 2 pro": (
        "hermes",
        '<tool_call>\n{"arguments": {"symbol": "TSLA"}, "name": "get_stock_fundamentals"}\n</tool_call>',
        "",
        [("get_stock_fundamentals", {"symbol": "TSLA"})],
    ),
    # https://qwen.readthedocs.io/en/v2.5/framework/function_call.html
    "qwen 2.5, parallel": (
        "hermes",
        '<tool_call>\n{"name": "get_current_temperature", "arguments": {"location": '
        '"San Francisco, CA, USA"}}'
        '\n</tool_call>\n<tool_call>\n{"name": "get_temperature_date", "arguments": {"location": '
        '"San Francisco, CA, USA", "date": "2024-10-01"}}\n</tool_call>',
        "",
        [
            ("get_current_temperature", {"location": "San Francisco, CA, USA"}),
            ("get_temperature_date", {"location": "San Francisco, CA, USA", "date": "2024-10-01"}),
        ],
    ),
    # https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/, JSON based tool calling
    "llama 3.1": (
        "llama",
        '{"name": "spotify_trending_songs", "parameters": {"n": "5"}}',
        "",
        [("spotify_trending_songs", {"n": "5"})],
    ),
    "llama 3.1, with the tag": (
        "llama",
        '<|python_tag|>{"name": "f", "parameters": {"a": [1, {"b": "}"}]}}; {"name": "f", "parameters": {}}',
        "",
        [("f", {"a": [1, {"b": "}"}]}), ("f", {})],
    ),
    "llama 3.1, a built-in tool": (
        "llama",
        '<|python_tag|>brave_search.call(query="current weather in Menlo Park")',
        '<|python_tag|>brave_search.call(query="current weather in Menlo Park")',
        [],
    ),
    # https://docs.mistral.ai/capabilities/function_calling/, mistral-common's tests of tokenizer v3
    "mistral v3": (
        "mistral",
        '[TOOL_CALLS] [{"name": "get_current_weather", "arguments": {"location": "Paris, France", "format": '
        '"celsius"}, "id": "VvvODy9mT"}]',
        "",
        [("get_current_weather", {"location": "Paris, France", "format": "celsius"})],
    ),
    "mistral v3, parallel": (
        "mistral",
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {"a": 2}}]',
        "",
        [("f", {"a": 1}), ("f", {"a": 2})],
    ),
    "mistral v11": (
        "mistral",
        'Let me see.[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"a": "[TOOL_CALLS]"}[TOOL_CALLS]'
        'get_current_weather{"b": 2}',
        "Let me see.",
        [("f", {"a": "[TOOL_CALLS]"}), ("get_current_weather", {"b": 2})],
    ),
    "mistral v13": (
        "mistral",
        '[TOOL_CALLS]f[ARGS]{}',
        "",
        [("f", {})],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_examples(name):
    style, text, content, calls = PUBLISHED[name]
    said, called, _ = parse(style, text)
    assert said == content
    assert [(name, json.loads(arguments)) for name, arguments in called] == calls


@pytest.mark.parametrize(
    ("style", "text", "content", "calls"),
    [
        # Arguments are as they were written.
        ("hermes", 'I look.\n<tool_call>{"name":"f","arguments":{ "x" : 1e2 }}</tool_call>\n', "I look.",
         [("f", '{ "x" : 1e2 }')]),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "",
         [("f", '{"x": 1}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "", [("f", "[1]")]),
        ("hermes", '<tool_call>{"id": 7, "name": "f", "arguments": {}, "x": {"name": "g"}}</tool_call> bye',
         " bye", [("f", "{}")]),
        # Without the end of a call, with two beginnings, cut off.
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}\n<tool_call>{"name": "g", "arguments": {}}', "",
         [("f", "{}"), ("g", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": "ab', "", [("f", '{"x": "ab')]),
        ("hermes", '<tool_call>{"name": "f', '<tool_call>{"name": "f', []),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}, oops</tool_call>\nwell', "\nwell",
         [("f", '{"x": 1}')]),
        # What is no call is content.
        ("hermes", "  a < b <tool_ <tool_calls> \n", "  a < b <tool_ <tool_calls> \n", []),
        ("hermes", "<tool_call>hello</tool_call>", "<tool_call>hello</tool_call>", []),
        ("hermes", '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
         '<tool_call>{"name": 1, "arguments": {}}</tool_call>', []),
        ("hermes", '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', []),
        ("hermes", "", "", []),
        ("hermes", " \n", " \n", []),
        ("llama", '{"name": "nobody", "parameters": {}}', '{"name": "nobody", "parameters": {}}', []),
        ("llama", ' {"name": "f", "age": 3} ', ' {"name": "f", "age": 3} ', []),
        ("llama", '{"a": 1} and more', '{"a": 1} and more', []),
        ("llama", 'So: {"name": "f", "parameters": {}}', 'So: {"name": "f", "parameters": {}}', []),
        ("llama", ' {"name": "f", "parameters": {"x": 1}} \n', "", [("f", '{"x": 1}')]),
        ("llama", '{"name": "f", "parameters": {"x": 1}} done', " done", [("f", '{"x": 1}')]),
        ("llama", '{"parameters": {"x": 1}, "name": "f"}', "", [("f", '{"x": 1}')]),
        ("llama", "<|python", "<|python", []),
        ("mistral", "no [TOOL] here [TOOL_CALLS", "no [TOOL] here [TOOL_CALLS", []),
        ("mistral", "[TOOL_CALLS] what else", "[TOOL_CALLS] what else", []),
        ("mistral", "[TOOL_CALLS][1]", "[TOOL_CALLS][1]", []),
        ("mistral", "[TOOL_CALLS]a b{}", "[TOOL_CALLS]a b{}", []),
        ("mistral", "[TOOL_CALLS]" + "x" * 400, "[TOOL_CALLS]" + "x" * 400, []),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}, 7] x', "", [("f", "{}")]),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}] x', " x", [("f", "{}")]),
        ("mistral", '[TOOL_CALLS][{"name": "f", "argu', '[TOOL_CALLS][{"name": "f", "argu', []),
    ],
)  # fmt: skip
def test_other_answers(style, text, content, calls):
    assert parse(style, text)[:2] == (content, calls)


fragments = st.sampled_from(
    [*'{}[]":, \n\\<>a1', "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
     "<|python_tag|>",
     "<think>", "</think>", '{"name": "f", "arguments": {"x": "', '"}}', '"name": ', '"parameters": ', "null",
     '{"name": "f", "parameters": {}}', "é🎉", "name", "; "]
)  # fmt: skip


@pytest.mark.parametrize("style", sorted(parsers()))
@given(text=st.lists(fragments, max_size=12).map("".join), cuts=st.sets(st.integers(0, 150)))
@example(text='<tool_call>{"name": "f"<tool_call>', cuts={13})
@settings(max_examples=150)
def test_pieces_do_not_depend_on_where_the_text_is_cut(style, text, cuts):
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    parts = [text[start:end] for start, end in pairwise(places)]
    whole = read(parsers()[style], [text])
    assert read(parsers()[style], parts) == whole
    assert read(parsers()[style], text) == whole
    calls = [piece for piece in whole if isinstance(piece, Call)]
    if not calls and style != "thinking":
        assert "".join(piece.text for piece in whole) == text, "nothing is lost"


# ---- thoughts


@pytest.mark.parametrize(
    ("text", "content", "thoughts"),
    [
        ("<think>\nOkay, so\n2 < 3.\n</think>\n\nYes.\n", "Yes.\n", "Okay, so\n2 < 3."),  # Qwen3's model card
        ("<think>\n\n</think>\n\nYes.", "Yes.", ""),
        ("\n<think>cut off ", "", "cut off"),
        ("Yes. <think>no</think>", "Yes. <think>no</think>", ""),
        (" <thin", " <thin", ""),
        (" Yes", " Yes", ""),
    ],
)
def test_thoughts_come_before_the_content(text, content, thoughts):
    assert parse("thinking", text) == (content, [], thoughts)


def test_calls_may_follow_thoughts_and_are_none_in_them():
    text = '<think>I call <tool_call>{"name": "g"}</tool_call></think><tool_call>{"name": "f"}</tool_call>'
    assert parse("thinking", text) == ("", [("f", "{}")], 'I call <tool_call>{"name": "g"}</tool_call>')


@pytest.mark.parametrize(
    ("end", "thinking"),
    [
        ("<|im_start|>assistant\n", "possible"),
        ("<|im_start|>assistant\n<think>\n", "begun"),  # DeepSeek R1, Qwen3 2507 Thinking
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "none"),  # Qwen3 with enable_thinking false
        ("<think> what is that?", "possible"),
    ],
)
def test_the_prompt_tells_whether_thoughts_have_begun(end, thinking):
    assert thinking_after(end) == thinking


def test_calls_beyond_the_wanted_number_are_left_out():
    parser = AnswerParser(calls=HermesParser(), most_calls=1)
    text = "".join(f'<tool_call>{{"name": "f", "arguments": {{"i": {i}}}}}</tool_call>' for i in range(3))
    assert read(parser, [text]) == [Call(0, "f"), Arguments(0, '{"i": 0}')]
    assert parser.calls == 1
