"""The official client against the router: what its users see."""

import json

import openai
import pytest

from services.router.config import RouterConfig
from tests.fakes import EOS, FakeEngine
from tests.router.serving import chat, serving

USER = [{"role": "user", "content": "hi"}]


async def test_chat():
    async with serving(FakeEngine("Hello wörld 🎉")) as served:
        answer = await served.openai.chat.completions.create(model="fake", messages=USER)
        assert answer.choices[0].message.content == "Hello wörld 🎉"
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.object == "chat.completion"
        assert answer.id.startswith("chatcmpl-")
        prompt = len("_user\nhi_\n_assistant\n")
        length = len("Hello wörld 🎉".encode())
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, length)
        assert usage.total_tokens == prompt + length


async def test_chat_stream_begins_with_the_role_and_ends_with_usage():
    async with serving(FakeEngine("Hello wörld 🎉", step_s=0.002)) as served:
        stream = await served.openai.chat.completions.create(
            model="fake", messages=USER, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        *body, last = chunks
        assert "".join(chunk.choices[0].delta.content or "" for chunk in body) == "Hello wörld 🎉"
        assert [chunk.choices[0].finish_reason for chunk in body if chunk.choices[0].finish_reason] == [
            "stop"
        ]
        assert all(chunk.usage is None for chunk in body)
        assert (last.choices, last.usage.completion_tokens) == ([], len("Hello wörld 🎉".encode()))
        assert len({chunk.id for chunk in chunks}) == 1
        assert len(body) > 5  # tokens went out as they came


async def test_a_stream_without_include_usage_has_none():
    async with serving(FakeEngine("Hi")) as served:
        stream = await served.openai.chat.completions.create(model="fake", messages=USER, stream=True)
        assert [chunk.usage for chunk in [chunk async for chunk in stream] if chunk.usage] == []


async def test_completions_whole_and_streamed():
    async with serving(FakeEngine("Hello there, world")) as served:
        answer = await served.openai.completions.create(model="fake", prompt="say", max_tokens=5)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Hello", "length")
        assert answer.object == "text_completion"
        answer = await served.openai.completions.create(model="fake", prompt="say")
        assert answer.usage.completion_tokens == 16
        stream = await served.openai.completions.create(
            model="fake",
            prompt=[104, 105],
            max_tokens=50,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "Hello there, world"
        assert chunks[-1].usage.prompt_tokens == 2


async def test_all_sampling_fields_reach_the_worker():
    async with serving() as served:
        await served.openai.chat.completions.create(
            model="fake",
            messages=USER,
            max_completion_tokens=7,
            temperature=0.3,
            top_p=0.8,
            presence_penalty=0.1,
            frequency_penalty=0.2,
            seed=11,
            logit_bias={"65": -5},
            extra_body={
                "top_k": 12,
                "min_p": 0.05,
                "repetition_penalty": 1.2,
                "min_tokens": 3,
                "ignore_eos": True,
                "stop_token_ids": [10],
                "priority": 2,
                "retention": [{"start": 0, "end": 16, "priority": 90, "ttl_s": 60}],
            },
        )
        (request,) = served.engines[0].submitted
        sampling = request.sampling
        assert (sampling.max_tokens, sampling.min_tokens) == (7, 3)
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.3, 0.8, 12, 0.05)
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.1, 0.2)
        assert (sampling.repetition_penalty, sampling.seed, sampling.ignore_eos) == (1.2, 11, True)
        assert (sampling.logit_bias, sampling.stop_token_ids) == ({65: -5.0}, (10,))
        assert request.priority == 2
        (kept,) = request.retention
        assert (kept.start, kept.end, kept.priority, kept.ttl_s) == (0, 16, 90, 60.0)


@pytest.mark.parametrize("stream", [False, True])
async def test_n_answers_come_from_one_worker_with_seeds_of_their_own(stream):
    engines = [FakeEngine(lambda request: f"seed {request.sampling.seed}".encode()) for _ in range(2)]
    async with serving(*engines) as served:
        answer = await served.openai.chat.completions.create(
            model="fake", messages=USER, n=3, seed=40, stream=stream
        )
        texts = ["", "", ""]
        if stream:
            async for chunk in answer:
                texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        else:
            texts = [choice.message.content for choice in answer.choices]
            assert answer.usage.completion_tokens == 3 * len("seed 40")
        assert texts == ["seed 40", "seed 41", "seed 42"]
        assert sorted(len(engine.submitted) for engine in engines) == [0, 3]


async def test_stop_strings_cut_the_text_cancel_the_worker_and_count_right():
    async with serving(FakeEngine(step_s=0.001)) as served:
        answer = await served.openai.chat.completions.create(model="fake", messages=USER, stop=["fox", "zzz"])
        assert answer.choices[0].message.content == "The quick brown "
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == len("The quick brown fox")
        await served.paid_back()
        assert len(served.engines[0].cancelled) == 1


async def test_a_stop_string_of_one_answer_leaves_the_others_running():
    def reply(request):
        return b"a STOP b" if request.sampling.seed == 0 else b"all of it"

    async with serving(FakeEngine(reply, step_s=0.001)) as served:
        answer = await served.openai.chat.completions.create(
            model="fake", messages=USER, n=2, seed=0, stop="STOP"
        )
        assert [choice.message.content for choice in answer.choices] == ["a ", "all of it"]


async def test_stop_token_ids_and_ignored_ends_work():
    async with serving(FakeEngine("ab.cd")) as served:
        answer = await served.openai.chat.completions.create(
            model="fake", messages=USER, extra_body={"stop_token_ids": [ord(".")]}
        )
        assert answer.choices[0].message.content == "ab"
        answer = await served.openai.chat.completions.create(
            model="fake", messages=USER, max_tokens=9, extra_body={"ignore_eos": True}
        )
        assert answer.usage.completion_tokens == 9
        assert answer.choices[0].message.content == "ab.cd"
        assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(stream):
    async with serving(FakeEngine("Hü")) as served:
        answer = await served.openai.chat.completions.create(
            model="fake", messages=USER, logprobs=True, top_logprobs=2, stream=stream
        )
        if stream:
            entries = [
                entry async for chunk in answer for entry in (chunk.choices[0].logprobs or _NONE).content
            ]
        else:
            entries = answer.choices[0].logprobs.content
        assert [entry.bytes for entry in entries] == [[72], [0xC3], [0xBC]]
        assert entries[0].token == "H"
        assert entries[0].logprob == -0.5
        assert [top.token for top in entries[0].top_logprobs] == ["H", "I"]


class _NONE:
    content = ()


async def test_completion_logprobs():
    async with serving(FakeEngine("Hi")) as served:
        answer = await served.openai.completions.create(model="fake", prompt="x", logprobs=1)
        logprobs = answer.choices[0].logprobs
        assert (logprobs.tokens, logprobs.text_offset) == (["H", "i"], [0, 1])
        assert logprobs.top_logprobs == [{"H": -0.5}, {"i": -0.5}]


async def test_tools_and_system_messages_reach_the_template():
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    async with serving(FakeEngine("ok")) as served:
        await served.openai.chat.completions.create(
            model="fake", messages=[{"role": "system", "content": "S"}, *USER], tools=[tool]
        )
        text = bytes(token for token in served.engines[0].submitted[0].tokens if token < 256).decode()
        assert text == f"system\n[{json.dumps(tool)}]\nsystem\nS\nuser\nhi\nassistant\n"


async def test_a_repeated_prompt_is_cached_and_says_so():
    async with serving() as served:
        question = chat("x" * 200, max_tokens=2)
        first = await served.openai.chat.completions.create(**question)
        again = await served.openai.chat.completions.create(**question)
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        assert again.usage.prompt_tokens_details.cached_tokens == (first.usage.prompt_tokens - 1) // 16 * 16


async def test_models_are_listed_and_found():
    async with serving() as served:
        models = await served.openai.models.list()
        assert [model.id for model in models.data] == ["fake"]
        assert (await served.openai.models.retrieve("fake")).max_model_len == 8192
        with pytest.raises(openai.NotFoundError):
            await served.openai.models.retrieve("other")


@pytest.mark.parametrize(
    ("fields", "error", "param", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model", "model_not_found"),
        ({"temperature": 3}, openai.BadRequestError, "temperature", "invalid_value"),
        ({"max_tokens": 10_000}, openai.BadRequestError, "max_tokens", "context_length_exceeded"),
        ({"extra_body": {"nonsense": 1}}, openai.BadRequestError, "nonsense", "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, openai.BadRequestError, "messages",
         "context_length_exceeded"),
    ],
)  # fmt: skip
async def test_errors_are_the_clients_own_exceptions(fields, error, param, code):
    async with serving() as served:
        with pytest.raises(error) as raised:
            await served.openai.chat.completions.create(**{"model": "fake", "messages": USER, **fields})
        assert (raised.value.param, raised.value.code) == (param, code)


async def test_a_key_is_needed_where_keys_are_set():
    async with serving(config=RouterConfig(api_keys=("right",))) as served:
        with pytest.raises(openai.AuthenticationError):
            await served.openai.chat.completions.create(**chat())
        with pytest.raises(openai.AuthenticationError):
            await served.openai.models.list()
        client = served.openai.with_options(api_key="right")
        assert (await client.chat.completions.create(**chat(max_tokens=1))).choices
        for path in ("/health", "/ready", "/metrics", "/openapi.json"):
            assert (await served.http.get(path)).status_code == 200


async def test_eos_is_not_among_the_tokens_counted():
    async with serving(FakeEngine(lambda _: [65, EOS])) as served:
        answer = await served.openai.chat.completions.create(model="fake", messages=USER)
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (1, "stop")
