import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.loadgen.prompts import Vocabulary
from benchmarks.loadgen.trace import TraceError, read_trace, replay
from benchmarks.loadgen.workload import Session

LINES = [
    {"timestamp": 27_000, "input_length": 1100, "output_length": 7, "hash_ids": [0, 1, 2]},
    {"timestamp": 30_000, "input_length": 1536, "output_length": 500, "hash_ids": [0, 1, 3]},
    {"timestamp": 27_500, "input_length": 1000, "output_length": 9, "hash_ids": [0, 4]},
]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def sessions_of(path: Path, time_scale: float = 1.0, length_scale: float = 1.0) -> list[Session]:
    return list(replay(read_trace(path, None), time_scale, length_scale).sessions)


def shared_tokens(vocabulary: Vocabulary, a: Session, b: Session) -> int:
    pairs = zip(vocabulary.ids(a.turns[0].user), vocabulary.ids(b.turns[0].user), strict=False)
    return next((index for index, (left, right) in enumerate(pairs) if left != right), -1)


def test_equal_hash_ids_give_equal_tokens_and_other_ids_others(tmp_path: Path) -> None:
    first, third, second = sessions_of(write(tmp_path / "t", LINES))
    vocabulary = Vocabulary(0, 32_000)
    assert shared_tokens(vocabulary, first, second) == 1024
    assert shared_tokens(vocabulary, first, third) == 512


def test_prompts_and_answers_have_the_lengths_of_the_trace(tmp_path: Path) -> None:
    sessions = sessions_of(write(tmp_path / "t", LINES))
    vocabulary = Vocabulary(0, 32_000)
    assert [len(vocabulary.ids(s.turns[0].user)) for s in sessions] == [1100, 1000, 1536]
    assert [s.turns[0].output_tokens for s in sessions] == [7, 9, 500]


def test_requests_come_in_order_of_time_counted_from_the_first_and_scaled(tmp_path: Path) -> None:
    path = write(tmp_path / "t", LINES)
    assert [s.start_s for s in sessions_of(path)] == [0.0, 0.5, 3.0]
    assert [s.start_s for s in sessions_of(path, time_scale=0.5)] == [0.0, 0.25, 1.5]


def test_length_scale_keeps_which_blocks_are_shared(tmp_path: Path) -> None:
    first, third, second = sessions_of(write(tmp_path / "t", LINES), length_scale=1 / 8)
    vocabulary = Vocabulary(0, 32_000)
    assert shared_tokens(vocabulary, first, second) == 2 * 64
    assert shared_tokens(vocabulary, first, third) == 64
    assert [len(vocabulary.ids(s.turns[0].user)) for s in (first, second)] == [128 + 10, 192]
    assert [s.turns[0].output_tokens for s in (first, second)] == [1, 62]


def test_the_longest_request_is_known_before_it_is_sent(tmp_path: Path) -> None:
    lines = read_trace(write(tmp_path / "t", LINES), None)
    assert replay(lines, 1, 1).longest_tokens == 1536 + 500
    assert replay(lines, 1, 1 / 8).longest_tokens == 192 + 62


def test_limit_takes_the_first_requests_in_time(tmp_path: Path) -> None:
    workload = replay(read_trace(write(tmp_path / "t", LINES), 2), 1.0, 1.0)
    assert workload.requests == 2
    assert [s.start_s for s in workload.sessions] == [0.0, 0.5]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: "),
        (LINES[0] | {"input_length": 0}, "line 2: .*>= 1 - at `\\$.input_length`"),
        (LINES[0] | {"output_length": "7"}, "line 2: .*\\$.output_length"),
        ({"timestamp": 0}, "line 2: .*missing required field `input_length`"),
        (LINES[0] | {"hash_ids": [0]}, "line 2: input_length 1100 needs 3 hash_ids of 512 tokens, got 1"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(tmp_path: Path, line: Any, complaint: str) -> None:
    with pytest.raises(TraceError, match=complaint):
        read_trace(write(tmp_path / "t", [LINES[0], line]), None)


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="holds no request"):
        read_trace(write(tmp_path / "t", ["", ""]), None)
