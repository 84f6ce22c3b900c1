from collections import Counter
from itertools import islice

from benchmarks.loadgen.workload import (
    Range,
    Span,
    conversation,
    random_prompts,
    shared_prefix,
    warmup_prompts,
)

LENGTHS = (Range(10, 20), Range(3, 5))


def test_the_same_seed_gives_the_same_sessions_and_another_seed_others() -> None:
    first, again, other = (list(random_prompts(seed, 50, *LENGTHS).sessions) for seed in (1, 1, 2))
    assert first == again
    assert [s.turns[0].user[0].tokens for s in first] != [s.turns[0].user[0].tokens for s in other]


def test_random_prompts_share_no_segment_with_each_other_nor_with_warm_up() -> None:
    sessions = [
        *random_prompts(0, 40, *LENGTHS).sessions,
        *warmup_prompts(0, 40, *LENGTHS).sessions,
    ]
    assert len({segment.name for s in sessions for segment in s.turns[0].user}) == 80


def test_lengths_are_drawn_from_the_whole_range_and_never_outside() -> None:
    sessions = list(random_prompts(0, 500, *LENGTHS).sessions)
    assert {s.turns[0].user[0].tokens for s in sessions} == set(range(10, 21))
    assert {s.turns[0].output_tokens for s in sessions} == {3, 4, 5}


def test_shared_prefix_gives_every_group_its_prefix_and_its_number_of_different_questions() -> None:
    workload = shared_prefix(0, 4, 5, Range(100, 200), *LENGTHS)
    sessions = list(workload.sessions)
    assert workload.requests == len(sessions) == 20
    assert set(Counter(s.system for s in sessions).values()) == {5}
    assert len({s.turns[0].user[0].name for s in sessions}) == 20


def test_shared_prefix_visits_every_group_once_a_round_in_changing_order() -> None:
    prefixes = [s.system[0].name for s in shared_prefix(0, 8, 6, Range(9, 9), *LENGTHS).sessions]
    rounds = [prefixes[start : start + 8] for start in range(0, 48, 8)]
    assert all(len(set(round_)) == 8 for round_ in rounds)
    assert len({tuple(round_) for round_ in rounds}) > 1


def test_a_workload_without_a_number_never_ends_and_can_be_cut() -> None:
    endless = shared_prefix(0, 2, None, Range(9, 9), *LENGTHS)
    assert endless.requests is None
    assert len(list(islice(endless.sessions, 1000))) == 1000
    cut = shared_prefix(0, 2, None, Range(9, 9), *LENGTHS).first(7)
    assert cut.requests == len(list(cut.sessions)) == 7
    assert random_prompts(0, 5, *LENGTHS).first(9).requests == 5


def test_conversations_have_their_turns_one_system_prompt_and_no_wait_before_the_first() -> None:
    workload = conversation(0, 3, 4, Range(50, 60), *LENGTHS, Span(1.0, 2.0))
    sessions = list(workload.sessions)
    assert workload.requests == 12
    assert [len(s.turns) for s in sessions] == [4, 4, 4]
    assert len({s.system for s in sessions}) == 1
    for session in sessions:
        assert session.turns[0].think_s == 0.0
        assert all(1.0 <= turn.think_s <= 2.0 for turn in session.turns[1:])


def test_no_request_is_longer_than_the_workload_says() -> None:
    workload = conversation(0, 30, 4, Range(0, 60), *LENGTHS, Span(0, 0))
    lengths = [
        sum(segment.tokens for segment in s.system)
        + sum(segment.tokens for turn in s.turns for segment in turn.user)
        + sum(turn.output_tokens for turn in s.turns)
        for s in workload.sessions
    ]
    assert max(lengths) <= workload.longest_tokens == 60 + 4 * (20 + 5)
