import asyncio
import time

import pytest

from services.router.api.errors import ApiError
from services.router.api.requests import ChatRequest, CompletionRequest, Message
from services.router.prompt import PromptBuilder
from services.router.text.model_text import ModelText
from services.wire.hashes import chain_hashes, pack_tokens, root_hash
from tests.fakes import EOS, byte_text_assets
from tests.router.text.tokenizers import SAMPLE
from tests.router.workers import CARD

TEXT = ModelText(byte_text_assets(), 260)


async def build(request, size=0, card=CARD):
    builder = PromptBuilder()
    try:
        return await builder.build(request, size, TEXT, card, 16, b"salt")
    finally:
        builder.close()


async def test_block_names_are_those_of_the_wire_contract():
    prompt = await build(CompletionRequest(model="m", prompt="x" * 50))
    root = root_hash(CARD.fingerprint, b"salt")
    assert prompt.root(CARD.fingerprint) == root
    assert prompt.hashes(CARD.fingerprint, 16) == chain_hashes(root, pack_tokens([ord("x")] * 50), 16)
    assert prompt.hashes(CARD.fingerprint, 32) == chain_hashes(root, pack_tokens([ord("x")] * 50), 32)
    assert len(prompt.hashes(CARD.fingerprint, 16)) == 3


@pytest.mark.parametrize("prompt_length", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("answer_length", [0, 1, 15, 16, 60])
async def test_an_answers_blocks_are_named_as_if_prompt_and_answer_were_one_prompt(
    prompt_length, answer_length
):
    prompt = await build(CompletionRequest(model="m", prompt="x" * prompt_length))
    answer = list(range(answer_length))
    whole = await build(CompletionRequest(model="m", prompt=prompt.tokens + answer))
    for size in (16, 32):
        assert prompt.with_answer(answer, CARD.fingerprint, size) == (
            whole.packed,
            whole.hashes(CARD.fingerprint, size),
        )
    assert len(prompt.hashes(CARD.fingerprint, 16)) == prompt_length // 16


async def test_token_ids_are_taken_as_they_are_and_checked():
    prompt = await build(CompletionRequest(model="m", prompt=[5, EOS, 7]))
    assert prompt.tokens == [5, EOS, 7]
    for bad in (CARD.vocab_size, -1, 2**40):
        with pytest.raises(ApiError, match=f"from 0 to 999, got {bad}"):
            await build(CompletionRequest(model="m", prompt=[bad]))


@pytest.mark.parametrize("size", [0, 1_000_000])
async def test_a_prompt_that_leaves_no_room_is_refused_naming_the_limit(size):
    chat = ChatRequest(model="m", messages=[Message("user", "x" * 9000)])
    with pytest.raises(ApiError, match=r"messages: 90\d\d tokens.*8192") as error:
        await build(chat, size)
    assert error.value.detail.code == "context_length_exceeded"


async def test_long_prompts_do_not_hold_the_loop_up():
    text = SAMPLE * 4_000
    card = CARD.__class__(
        **{name: getattr(CARD, name) for name in CARD.__struct_fields__} | {"max_model_len": 10**8}
    )
    task = asyncio.create_task(build(CompletionRequest(model="m", prompt=text), len(text), card))
    turns = 0
    started = time.perf_counter()
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
    assert len((await task).tokens) == len(text.encode())
    assert turns > 20 * (time.perf_counter() - started)  # a turn of the loop takes under 50 ms on average


async def test_a_templates_refusal_names_messages():
    request = ChatRequest(model="m", messages=[Message("user", "x")], chat_template_kwargs={"add": 1})
    broken = ModelText(byte_text_assets(), 260)
    broken.template = None
    builder = PromptBuilder()
    with pytest.raises(ApiError, match=r"^messages: .* no chat template") as error:
        await builder.build(request, 0, broken, CARD, 16, b"")
    builder.close()
    assert error.value.detail.param == "messages"
