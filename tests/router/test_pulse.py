"""How long a worker may be silent before it counts as stalled."""

import msgspec
import pytest

from services.router.pulse import LEAST_S, LONGEST_LOOK_S, STEPS, Pulse
from services.wire.messages import Stats
from tests.router.workers import hello

STATS = Stats(1, 0, 0, 100, 0.0, 0.0, 0.0)


def looked(pulse, times, *, from_s=0.0, every_s=0.5):
    """The last of so many looks."""
    for look in range(times):
        silent_s = pulse.look(from_s + look * every_s)
    return silent_s


def test_silence_is_counted_from_the_last_sign_of_life():
    pulse = Pulse(hello())
    assert looked(pulse, 1) == 0
    assert looked(pulse, 4, from_s=0.5) == 2.0
    pulse.beat()
    assert looked(pulse, 1, from_s=2.5) == 0
    assert looked(pulse, 2, from_s=3.0) == 1.0


def test_a_changed_load_is_a_sign_of_life_and_the_same_one_again_is_none():
    pulse = Pulse(hello())
    looked(pulse, 1)
    assert pulse.reported(STATS)
    assert looked(pulse, 1, from_s=0.5) == 0
    assert not pulse.reported(STATS)
    assert looked(pulse, 1, from_s=1.0) == 0.5
    assert pulse.reported(msgspec.structs.replace(STATS, decode_step_s=0.011))
    assert looked(pulse, 1, from_s=1.5) == 0


def test_a_router_that_stood_still_itself_takes_nobody_for_stalled():
    pulse = Pulse(hello())
    looked(pulse, 1)
    assert looked(pulse, 1, from_s=60.0) == LONGEST_LOOK_S


@pytest.mark.parametrize(
    ("max_step_tokens", "rate", "decode_step_s", "limit_s"),
    [
        (8192, 40_000.0, 0.01, LEAST_S),  # a GPU
        (512, 100.0, 0.1, STEPS * (5.12 + 0.1)),  # a slow CPU
        (8192, 10.0, 0.1, 300.0),
        (8192, 0.0, 0.0, 300.0),  # nothing is known
    ],
)
def test_the_limit_follows_from_the_longest_honest_step(max_step_tokens, rate, decode_step_s, limit_s):
    greeting = msgspec.structs.replace(hello(rate=rate), max_step_tokens=max_step_tokens)
    pulse = Pulse(greeting)
    pulse.reported(msgspec.structs.replace(STATS, decode_step_s=decode_step_s))
    assert pulse.limit_s(300.0) == pytest.approx(limit_s)


def test_the_workers_own_rate_counts_once_it_has_one():
    pulse = Pulse(msgspec.structs.replace(hello(rate=1e6), max_step_tokens=512))
    assert pulse.limit_s(300.0) == LEAST_S
    pulse.reported(msgspec.structs.replace(STATS, prefill_tokens_per_s=256.0))
    assert pulse.limit_s(300.0) == STEPS * 2.0
