"""Several prompts in one request, and prompts that come back before their answers."""

import asyncio

import openai
import pytest

from services.router.config import RouterConfig
from tests.fakes import FakeEngine
from tests.fakes.until import until
from tests.router.serving import serving


def answer_of(request):
    """The prompt, backwards."""
    return [token for token in request.tokens if token < 256][::-1]


async def ask(served, prompt, **fields):
    return await served.openai.completions.create(model="fake", prompt=prompt, **{"max_tokens": 50, **fields})


PROMPTS = ["abc", "xy", "Zürich"]


@pytest.mark.parametrize("prompts", [PROMPTS, [list(prompt.encode()) for prompt in PROMPTS]])
async def test_choices_count_on_from_prompt_to_prompt(prompts):
    async with serving(FakeEngine(lambda request: [request.tokens[0], 33])) as served:
        answer = await ask(served, prompts, n=2)
        assert [choice.index for choice in answer.choices] == list(range(6))
        assert [choice.text for choice in answer.choices] == ["a!", "a!", "x!", "x!", "Z!", "Z!"]
        assert answer.usage.prompt_tokens == 3 + 2 + 7
        assert answer.usage.completion_tokens == 6 * 2


@pytest.mark.parametrize("with_usage", [False, True])
async def test_a_stream_of_several_prompts_is_one_stream(with_usage):
    async with serving(FakeEngine(answer_of, step_s=0.001)) as served:
        options = {"stream_options": {"include_usage": True}} if with_usage else {}
        stream = await ask(served, ["hello world", "abc", "x"], stream=True, **options)
        texts, reasons, ids, usage = {}, {}, set(), None
        async for chunk in stream:
            ids.add(chunk.id)
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
                if choice.finish_reason:
                    assert choice.index not in reasons
                    reasons[choice.index] = choice.finish_reason
        assert texts == {0: "dlrow olleh", 1: "cba", 2: "x"}
        assert reasons == {0: "stop", 1: "stop", 2: "stop"}
        assert len(ids) == 1
        assert (usage.completion_tokens if usage else None) == (15 if with_usage else None)


async def test_a_list_of_one_prompt_is_fine():
    async with serving(FakeEngine(answer_of)) as served:
        assert (await ask(served, ["abc"])).choices[0].text == "cba"
        assert (await ask(served, [[97, 98]])).choices[0].text == "ba"


async def test_what_one_prompt_cannot_have_the_request_cannot():
    async with serving() as served:
        with pytest.raises(openai.BadRequestError) as raised:
            await ask(served, ["abc", "x" * 9000])
        assert raised.value.code == "context_length_exceeded"
        assert not served.engines[0].submitted


async def test_a_full_queue_sheds_the_whole_request_and_holds_nothing():
    config = RouterConfig(max_queue=1)
    async with serving(FakeEngine(max_running=1, step_s=0.01), config=config) as served:
        with pytest.raises(openai.RateLimitError):
            await ask(served, ["a"] * 100)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_worker_that_fails_ends_the_request_once(stream):
    async with serving(FakeEngine(step_s=0.005)) as served:
        task = asyncio.create_task(collect(await_or_stream(served, stream)))
        await until(lambda: served.engines[0].stats().running == 3)
        await asyncio.sleep(0.05)
        while not task.done():  # once it goes on, where it does not get on it ends
            served.engines[0].fail_running("out of order")
            await asyncio.sleep(0.001)
        with pytest.raises(openai.APIError, match="out of order"):
            await task


async def await_or_stream(served, stream):
    return await ask(served, ["a", "b", "c"], stream=stream, max_tokens=5000)


async def collect(answer):
    answer = await answer
    if hasattr(answer, "__aiter__"):
        async for _ in answer:
            pass


async def test_a_client_that_leaves_frees_every_prompt():
    async with serving(FakeEngine(step_s=0.005)) as served:
        stream = await ask(served, ["a", "b", "c"], stream=True, max_tokens=5000)
        async for _ in stream:
            break
        await stream.close()
        await until(lambda: served.engines[0].idle)


# ---- echo


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echoed_prompt_comes_first_and_counts_as_prompt(stream):
    async with serving(FakeEngine("!", step_s=0.001)) as served:
        answer = await ask(served, ["Zürich", "b"], echo=True, stream=stream)
        if stream:
            texts = {}
            async for chunk in answer:
                for choice in chunk.choices:
                    texts[choice.index] = texts.get(choice.index, "") + choice.text
            assert texts == {0: "Zürich!", 1: "b!"}
        else:
            assert [choice.text for choice in answer.choices] == ["Zürich!", "b!"]
            assert answer.usage.completion_tokens == 2


async def test_token_ids_are_echoed_as_their_text():
    async with serving(FakeEngine("!")) as served:
        assert (await ask(served, list(b"abc"), echo=True)).choices[0].text == "abc!"


@pytest.mark.parametrize(
    ("fields", "param"), [({"echo": True, "logprobs": 1}, "echo"), ({"suffix": "x"}, "suffix")]
)
async def test_what_is_not_supported_is_refused_by_name(fields, param):
    async with serving() as served:
        with pytest.raises(openai.BadRequestError) as raised:
            await ask(served, "x", **fields)
        assert raised.value.param == param
