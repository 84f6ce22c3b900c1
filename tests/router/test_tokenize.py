"""/tokenize and /detokenize, as vLLM's clients use them."""

import openai
import pytest

from services.router.config import RouterConfig
from tests.fakes.text import BOS, EOS, IM_END, IM_START
from tests.router.serving import serving


async def post(served, path, **body):
    answer = await served.http.post(path, json=body)
    return answer.status_code, answer.json()


async def test_a_prompt_becomes_its_tokens_and_back():
    async with serving() as served:
        status, answer = await post(served, "/tokenize", model="fake", prompt="Zü", return_token_strs=True)
        assert status == 200
        assert answer == {
            "count": 3,
            "max_model_len": 8192,
            "tokens": list("Zü".encode()),
            "token_strs": ["Z", "Ã", "¼"],
        }
        status, answer = await post(served, "/detokenize", model="fake", tokens=[*answer["tokens"], EOS])
        assert (status, answer) == (200, {"prompt": "Zü<|eos|>"})


async def test_messages_become_the_prompt_that_a_chat_gets():
    async with serving() as served:
        messages = [{"role": "user", "content": "hi"}]
        tool = {"type": "function", "function": {"name": "f"}}
        await served.openai.chat.completions.create(
            model="fake", messages=messages, tools=[tool], max_tokens=1
        )
        _, answer = await post(served, "/tokenize", messages=messages, tools=[tool])
        assert answer["tokens"] == list(served.engines[0].submitted[0].tokens)
        _, answer = await post(served, "/tokenize", messages=messages, add_generation_prompt=False)
        assert answer["tokens"] == [IM_START, *b"user\nhi", IM_END, *b"\n"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": "x", "nonsense": 1}, 400, "nonsense"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [BOS, 10**6]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
    ],
)
async def test_errors_name_the_field(path, body, status, param):
    async with serving() as served:
        found, answer = await post(served, path, **body)
        assert (found, answer["error"]["param"]) == (status, param)


async def test_keys_and_limits_hold_here_too():
    async with serving(config=RouterConfig(api_keys=("right",), max_body_bytes=1024)) as served:
        assert (await post(served, "/tokenize", prompt="x"))[0] == 401
        headers = {"authorization": "Bearer right"}
        answer = await served.http.post("/tokenize", json={"prompt": "x" * 2000}, headers=headers)
        assert answer.status_code == 413
        assert (await served.http.get("/tokenize", headers=headers)).status_code == 405


async def test_embeddings_are_refused_clearly():
    async with serving() as served:
        with pytest.raises(openai.NotFoundError, match="embeddings are not supported"):
            await served.openai.embeddings.create(model="fake", input="x")
