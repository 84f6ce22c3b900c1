"""Structured output, tools and thoughts as users of the official client see them. The engine is scripted:
what it is told must be right, and what it says must come out right."""

import json

import openai
import pytest
from llguidance import LLMatcher, LLTokenizer
from pydantic import BaseModel

from services.router.config import RouterConfig
from tests.fakes import EOS, FakeEngine
from tests.fakes.text import FAKE_VOCAB, byte_text_assets
from tests.router.serving import serving

USER = [{"role": "user", "content": "hi"}]
TOKENIZER = LLTokenizer(byte_text_assets().tokenizer.decode(), n_vocab=FAKE_VOCAB, eos_token=[EOS])


def tool(name="weather", **fields):
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "parameters": schema, **fields}}


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
TWO_CALLS = f"Let me see.\n{CALL}\n{CALL.replace('Zürich', 'Bern')}"


async def ask(served, **fields):
    return await served.openai.chat.completions.create(**{"model": "fake", "messages": USER, **fields})


def grammar_lets(served, answer):
    """Whether the grammar that the engine was given allows just this answer."""
    grammar = served.engines[0].submitted[-1].sampling.grammar
    assert grammar
    matcher = LLMatcher(TOKENIZER, grammar, log_level=0)
    tokens = list(answer.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


# ---- structured output


class Person(BaseModel):
    name: str
    age: int


async def test_parse_gives_the_clients_own_type():
    async with serving(FakeEngine('{"name": "Ann", "age": 7}')) as served:
        answer = await served.openai.chat.completions.parse(
            model="fake", messages=USER, response_format=Person
        )
        assert answer.choices[0].message.parsed == Person(name="Ann", age=7)
        assert grammar_lets(served, '{"name": "Ann", "age": 7}')
        assert not grammar_lets(served, '{"name": "Ann"}')
        assert served.engines[0].submitted[-1].matcher is not None


@pytest.mark.parametrize(
    ("fields", "right", "wrong"),
    [
        ({"response_format": {"type": "json_object"}}, '{"a": [1]}', "[1]"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "{}", "1"),
        ({"guided_json": {"type": "integer"}}, "12", "a"),
        ({"guided_json": '{"type": "integer"}'}, "12", "a"),
        ({"guided_regex": "[ab]+"}, "abba", "c"),
        ({"guided_choice": ["yes", "no"]}, "no", "nope"),
        ({"guided_grammar": 'root ::= "x" | "y"'}, "y", "z"),
        ({"structured_outputs": {"json": {"type": "boolean"}}}, "true", "1"),
        ({"structured_outputs": {"regex": "a"}}, "a", "b"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "b", "c"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "a", "b"),
        ({"structured_outputs": {"json_object": True}}, "{}", "1"),
    ],
)
async def test_every_form_reaches_the_engine(fields, right, wrong):
    async with serving(FakeEngine("x")) as served:
        await ask(served, extra_body=fields)
        assert grammar_lets(served, right)
        assert not grammar_lets(served, wrong)
        await served.openai.completions.create(model="fake", prompt="x", extra_body=fields)
        assert grammar_lets(served, right)


async def test_text_is_free():
    async with serving(FakeEngine("x")) as served:
        await ask(served, response_format={"type": "text"})
        assert served.engines[0].submitted[-1].sampling.grammar == ""


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "x"}},
                }
            },
            "response_format.json_schema.schema",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": {"not": {"type": "string"}}},
                }
            },
            "response_format.json_schema.schema",
        ),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "3"}, "guided_json"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"structured_outputs": {"regex": "(", "json": None}}, "structured_outputs.regex"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml"),
        ({"guided_regex": "a", "min_tokens": 3}, "min_tokens"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"tools": [tool(parameters={"type": "x"}, strict=True)]}, "tools[0].function.parameters"),
        ({"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "f"}}},
         "tool_choice.function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)  # fmt: skip
async def test_a_bad_form_is_refused_by_name_before_anything_is_queued(fields, param):
    async with serving() as served:
        with pytest.raises(openai.BadRequestError) as raised:
            await ask(served, extra_body=fields)
        assert raised.value.param == param
        assert not served.engines[0].submitted


# ---- tools


@pytest.mark.parametrize("step_s", [0, 0.001])
async def test_calls_come_back_as_calls(step_s):
    async with serving(FakeEngine(TWO_CALLS, step_s=step_s)) as served:
        answer = await ask(served, tools=[tool()])
        choice = answer.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Let me see."
        assert [call.function.name for call in choice.message.tool_calls] == ["weather", "weather"]
        cities = [json.loads(call.function.arguments)["city"] for call in choice.message.tool_calls]
        assert cities == ["Zürich", "Bern"]
        assert len({call.id for call in choice.message.tool_calls}) == 2
        assert served.engines[0].submitted[-1].sampling.grammar == "", "auto is free"


async def test_an_answer_of_calls_alone_has_no_content():
    async with serving(FakeEngine(CALL)) as served:
        message = (await ask(served, tools=[tool()])).choices[0].message
        assert message.content is None
        assert len(message.tool_calls) == 1


async def test_streamed_calls_begin_with_their_name_and_grow():
    async with serving(FakeEngine(TWO_CALLS, step_s=0.001)) as served:
        stream = await ask(served, tools=[tool()], stream=True, n=2)
        deltas = {0: [], 1: []}
        reasons = {}
        async for chunk in stream:
            choice = chunk.choices[0]
            deltas[choice.index].append(choice.delta)
            reasons[choice.index] = choice.finish_reason
        assert reasons == {0: "tool_calls", 1: "tool_calls"}
        for parts in deltas.values():
            assert "".join(part.content or "" for part in parts) == "Let me see."
            calls = [call for part in parts for call in part.tool_calls or ()]
            for index, city in ((0, "Zürich"), (1, "Bern")):
                first, *rest = [call for call in calls if call.index == index]
                assert first.id
                assert (first.type, first.function.name, first.function.arguments) == (
                    "function",
                    "weather",
                    "",
                )
                assert all(call.id is None and call.function.name is None for call in rest)
                assert json.loads("".join(call.function.arguments for call in rest)) == {"city": city}
                assert len(rest) > 5, "arguments go out as they come"


async def test_the_clients_stream_helper_puts_calls_together():
    async with serving(FakeEngine(CALL, step_s=0.001)) as served:
        async with served.openai.chat.completions.stream(
            model="fake", messages=USER, tools=[tool(strict=True)]
        ) as stream:
            async for _ in stream:
                pass
            message = (await stream.get_final_completion()).choices[0].message
        assert message.tool_calls[0].function.parsed_arguments == {"city": "Zürich"}


async def test_log_probabilities_go_with_calls():
    async with serving(FakeEngine(CALL, step_s=0.001)) as served:
        stream = await ask(served, tools=[tool()], stream=True, logprobs=True)
        tokens = [
            entry.bytes[0]
            async for chunk in stream
            if chunk.choices[0].logprobs
            for entry in chunk.choices[0].logprobs.content
        ]
        assert bytes(tokens).decode() == CALL


async def test_without_tools_the_same_text_is_content():
    async with serving(FakeEngine(CALL)) as served:
        for fields in ({}, {"tools": [tool()], "tool_choice": "none"}):
            choice = (await ask(served, **fields)).choices[0]
            assert (choice.message.content, choice.message.tool_calls) == (CALL, None)
            assert choice.finish_reason == "stop"


async def test_parallel_calls_can_be_declined():
    async with serving(FakeEngine(TWO_CALLS)) as served:
        answer = await ask(served, tools=[tool()], parallel_tool_calls=False)
        assert len(answer.choices[0].message.tool_calls) == 1
        await ask(served, tools=[tool()], parallel_tool_calls=False, tool_choice="required")
        assert grammar_lets(served, CALL)
        assert not grammar_lets(served, f"{CALL}\n{CALL}")


async def test_a_call_can_be_demanded_also_of_one_function():
    other = CALL.replace("weather", "tide")
    async with serving(FakeEngine(CALL)) as served:
        tools = [tool(), tool("tide")]
        await ask(served, tools=tools, tool_choice="required")
        assert grammar_lets(served, f"{CALL}\n{other}")
        assert not grammar_lets(served, "Hello")
        assert not grammar_lets(served, CALL.replace('"Zürich"', "7"))
        await ask(served, tools=tools, tool_choice={"type": "function", "function": {"name": "tide"}})
        assert grammar_lets(served, other)
        assert not grammar_lets(served, CALL)


async def test_strict_functions_get_arguments_that_fit():
    async with serving(FakeEngine(CALL)) as served:
        await ask(served, tools=[tool(strict=True)])
        assert grammar_lets(served, f"Well. {CALL}")
        assert grammar_lets(served, "Hello")
        assert not grammar_lets(served, CALL.replace('"Zürich"', "7"))


async def test_tools_and_a_response_format_go_together():
    async with serving(FakeEngine(CALL)) as served:
        answer = await ask(served, tools=[tool()], response_format={"type": "json_object"})
        assert answer.choices[0].message.tool_calls
        assert grammar_lets(served, CALL)
        assert grammar_lets(served, '{"a": 1}')
        assert not grammar_lets(served, "Hello")


async def test_a_conversation_with_calls_goes_on():
    async with serving(FakeEngine(CALL)) as served:
        message = (await ask(served, tools=[tool()])).choices[0].message
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
        await ask(served, tools=[tool()], messages=[*USER, message.model_dump(exclude_none=True), result])
        assert len(served.engines[0].submitted) == 2


async def test_an_answer_cut_in_a_call_ends_for_its_length():
    async with serving(FakeEngine(CALL)) as served:
        choice = (await ask(served, tools=[tool()], max_tokens=60)).choices[0]
        assert choice.finish_reason == "length"
        cut = CALL.encode()[:60].decode()
        assert choice.message.tool_calls[0].function.arguments == cut.partition('"arguments": ')[2]


@pytest.mark.parametrize("style", ["llama", "mistral"])
async def test_the_way_that_calls_are_written_can_be_set(style):
    written = {
        "llama": '{"name": "weather", "parameters": {"city": "Bern"}}',
        "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Bern"}}]',
    }[style]
    async with serving(FakeEngine(written), config=RouterConfig(tool_call_parser=style)) as served:
        call = (await ask(served, tools=[tool()], tool_choice="required")).choices[0].message.tool_calls[0]
        assert json.loads(call.function.arguments) == {"city": "Bern"}
        assert grammar_lets(served, written)
        assert style != "mistral" or (len(call.id) == 9 and call.id.isalnum())


# ---- thoughts


@pytest.mark.parametrize("stream", [False, True])
async def test_thoughts_are_told_from_the_answer(stream):
    engine = FakeEngine("<think>\nHm, 2 < 3.\n</think>\n\nYes.", step_s=0.001)
    async with serving(engine, config=RouterConfig(thinks=True)) as served:
        answer = await ask(served, stream=stream)
        if stream:
            deltas = [chunk.choices[0].delta async for chunk in answer]
            content = "".join(delta.content or "" for delta in deltas)
            thoughts = "".join(getattr(delta, "reasoning_content", "") for delta in deltas)
            assert not any(delta.content and hasattr(delta, "reasoning_content") for delta in deltas)
        else:
            message = answer.choices[0].message
            content, thoughts = message.content, message.reasoning_content
        assert (thoughts, content) == ("Hm, 2 < 3.", "Yes.")


async def test_the_form_begins_after_the_thoughts():
    engine = FakeEngine('<think>Hm.</think>{"a": 1}')
    async with serving(engine, config=RouterConfig(thinks=True)) as served:
        message = (await ask(served, response_format={"type": "json_object"})).choices[0].message
        assert (message.reasoning_content, message.content) == ("Hm.", '{"a": 1}')
        assert grammar_lets(served, '<think>Hm.</think>\n\n{"a": 1}')
        assert grammar_lets(served, '{"a": 1}')
        assert not grammar_lets(served, "<think>Hm.</think>Hm.")
