import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.loadgen.prompts import WORDS, Reply, RequestWriter, Vocabulary
from benchmarks.loadgen.workload import Segment, Session, Turn

SESSION = Session(
    "session/0",
    tuple(Turn((Segment(f"said/{turn}", 4),), output_tokens=5) for turn in range(3)),
    system=(Segment("system", 8),),
)


def body(writer: RequestWriter, *replies: Reply) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(writer.write(SESSION, replies).body)
    return decoded


def test_tokens_never_change_between_releases() -> None:
    """Figures of two releases compare only if both were sent the same tokens."""
    assert Vocabulary(0, 32_000).ids([Segment("block/0", 4)]) == [14732, 19677, 4150, 26197]


@given(
    st.integers(256, 300_000),
    st.integers(0, 2**31),
    st.lists(st.tuples(st.text(max_size=5), st.integers(0, 50)), max_size=4),
)
def test_ids_are_as_many_as_asked_and_inside_the_vocabulary(
    size: int, seed: int, parts: list[tuple[str, int]]
) -> None:
    ids = Vocabulary(seed, size).ids([Segment(*part) for part in parts])
    assert len(ids) == sum(tokens for _, tokens in parts)
    assert all(size // 16 <= token < size for token in ids)


def test_a_shorter_segment_is_the_beginning_of_a_longer_one_of_its_name() -> None:
    vocabulary = Vocabulary(3, 50_000)
    assert vocabulary.ids([Segment("a", 300)])[:100] == vocabulary.ids([Segment("a", 100)])


def test_another_seed_and_another_name_give_other_tokens() -> None:
    rows = [Vocabulary(seed, 50_000).ids([Segment(name, 20)]) for seed in (0, 1) for name in ("a", "b")]
    assert len({tuple(row) for row in rows}) == 4


def test_words_are_one_for_each_token_and_all_different() -> None:
    assert len(Vocabulary(0, 50_000).words([Segment("a", 70), Segment("b", 30)]).split(" ")) == 100
    assert len(set(WORDS)) == len(WORDS)


def test_a_completion_sends_ids_and_grows_by_a_history_of_the_answers_length() -> None:
    writer = RequestWriter("completions", "m", Vocabulary(0, 32_000))
    prompts = [
        body(writer)["prompt"],
        body(writer, Reply("x", 5))["prompt"],
        body(writer, Reply("x", 5), Reply("y", 2))["prompt"],
    ]
    assert [len(prompt) for prompt in prompts] == [8 + 4, 8 + 4 + 5 + 4, 8 + 4 + 5 + 4 + 2 + 4]
    assert prompts[1][:12] == prompts[0]
    assert prompts[2][:21] == prompts[1]


def test_a_chat_repeats_the_whole_history_with_the_servers_own_answers() -> None:
    writer = RequestWriter("chat", "m", Vocabulary(0, 32_000))
    first = body(writer)["messages"]
    second = body(writer, Reply("one", 5))["messages"]
    third = body(writer, Reply("one", 5), Reply("two", 5))["messages"]
    assert [message["role"] for message in third] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
    ]
    assert second[:2] == first
    assert third[:4] == second
    assert [m["content"] for m in third if m["role"] == "assistant"] == ["one", "two"]


def test_every_request_asks_for_a_stream_with_usage_at_temperature_0() -> None:
    sent = body(RequestWriter("completions", "m", Vocabulary(0, 32_000)))
    assert sent.items() >= {"model": "m", "max_tokens": 5, "temperature": 0, "stream": True}.items()
    assert sent["stream_options"] == {"include_usage": True}
    assert sent["ignore_eos"] is True
    assert "logprobs" not in sent


def test_extensions_can_be_left_out_and_extra_fields_win() -> None:
    vocabulary = Vocabulary(0, 32_000)
    sent = body(
        RequestWriter("chat", "m", vocabulary, ignore_eos=False, extra={"temperature": 0.7, "user": "u"})
    )
    assert "ignore_eos" not in sent
    assert (sent["temperature"], sent["user"]) == (0.7, "u")


def test_counting_tokens_asks_for_logprobs_in_the_form_of_each_api() -> None:
    vocabulary = Vocabulary(0, 32_000)
    assert body(RequestWriter("chat", "m", vocabulary, count_tokens=True))["logprobs"] is True
    assert body(RequestWriter("completions", "m", vocabulary, count_tokens=True))["logprobs"] == 1
