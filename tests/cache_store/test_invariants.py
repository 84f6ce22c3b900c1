"""What always holds in the store, and the tests that prove it.

I1–I4 are the books', I5–I8 what readers and writers may count on, I9–I10 what is kept, I11–I15 many at once,
I16–I17 wrong data and other tenants, I18–I20 the whole.
"""

from __future__ import annotations

import threading
from importlib import import_module

import pytest
from redis import Redis

from services.cache_store.allocation import stored_bytes
from services.cache_store.client import BlockStore
from services.cache_store.embedded import LocalRedis
from services.cache_store.frames import FrameFormat
from tests.cache_store.harness import chain
from tests.cache_store.test_client import to_write

MODEL = (
    "cache_store.test_functions_model."
    "test_any_sequence_of_calls_keeps_the_invariants_and_agrees_with_the_model"
)
CRASHES = (
    "cache_store.test_crashes."
    "test_whoever_dies_wherever_the_books_add_up_and_every_ready_block_has_its_payload"
)
CLIENT_CRASHES = (
    "cache_store.test_client_crashes."
    "test_whatever_dies_and_is_lost_in_whatever_order_no_wrong_byte_is_read_and_no_byte_leaks"
)
FUNCTIONS, CLIENT, QUARANTINE, TENANTS = (
    f"cache_store.test_{name}.test_" for name in ("functions", "client", "quarantine", "tenants")
)

INVARIANTS: dict[str, tuple[str, list[str]]] = {
    "I1": (
        "a record's parent is the root or has a record; a lookup finds no block behind one that is not READY",
        [MODEL, CRASHES, CLIENT_CRASHES, FUNCTIONS + "a_block_whose_parent_is_not_stored_is_refused"],
    ),
    "I2": ("`children` is the number of records that name it as parent", [MODEL, CRASHES, CLIENT_CRASHES]),
    "I3": (
        "a block is in exactly one eviction queue if it is READY without children, else in none",
        [MODEL, CRASHES, CLIENT_CRASHES],
    ),
    "I4": (
        "sizes add up by owner and in all; no reservation goes beyond capacity or quota",
        [
            MODEL,
            CLIENT_CRASHES,
            FUNCTIONS + "the_total_never_exceeds_the_capacity",
            FUNCTIONS + "an_owner_at_its_quota_makes_room_among_its_own_blocks",
            "cache_store.test_operators.test_the_books_of_pinned_bytes_survive_loss_rewriting_and_deletion",
        ],
    ),
    "I5": (
        "no leased block is evicted or deleted; a lease ends after 30 seconds at most",
        [
            MODEL,
            FUNCTIONS + "a_leased_run_outlives_everything_else_until_it_is_released",
            FUNCTIONS + "a_lease_ends_by_itself_after_30_seconds_at_most",
            "cache_store.test_client_crashes."
            "test_a_reader_reads_all_that_it_found_whoever_needs_room_between_any_two_of_its_commands",
        ],
    ),
    "I6": (
        "a block being written is never found",
        [MODEL, FUNCTIONS + "a_block_being_written_is_not_found"],
    ),
    "I7": (
        "a commit under an old fence changes nothing, and no fence is given twice",
        [
            MODEL,
            FUNCTIONS + "a_commit_under_an_old_fence_changes_nothing",
            FUNCTIONS + "fences_never_repeat_even_after_the_store_was_emptied",
            FUNCTIONS + "a_replica_that_never_heard_of_the_latest_fences_gives_none_of_them_again",
            "cache_store.test_client_crashes."
            "test_a_writer_that_was_overtaken_at_any_command_leaves_nothing_of_its_own",
        ],
    ),
    "I8": (
        "a READY block has its payload; if it is lost, one read finds out and one write heals it, and what "
        "follows is kept for that long or deleted",
        [
            CRASHES,
            CLIENT_CRASHES,
            CLIENT + "a_bad_payload_is_a_miss_and_a_counter_and_never_data",
            QUARANTINE + "what_follows_a_damaged_block_is_found_again_when_the_block_is_written_in_time",
            QUARANTINE
            + "what_follows_a_damaged_block_goes_when_nobody_has_written_the_block_in_ten_minutes",
            "cache_store.test_failover.test_records_that_come_over_without_payloads_are_missed_once_and_heal",
        ],
    ),
    "I9": (
        "a block's priority is the highest of its live owners; no other's use or expiry changes it",
        [
            MODEL,
            FUNCTIONS + "the_highest_live_priority_counts_and_a_use_at_a_lower_one_never_demotes",
            FUNCTIONS + "a_use_by_the_owner_starts_the_time_anew_and_nobody_ends_or_extends_it",
        ],
    ),
    "I10": (
        "what an owner has under its floor goes for nobody else",
        [MODEL, FUNCTIONS + "what_an_owner_has_under_its_floor_goes_for_nobody_but_itself"],
    ),
    "I11": (
        "whoever applies a worker's events holds what the worker believes of the store (there is no stream: "
        "workers learn by asking, and an emptied store has another identity)",
        [
            "cache_store.test_known.test_whoever_applies_the_events_holds_the_same_set",
            "worker.test_store_tier.test_blocks_evicted_for_its_own_writes_are_reported_removed",
            FUNCTIONS + "a_store_that_loses_one_of_its_keys_goes_on_at_worst_from_empty",
            CLIENT + "redis_restarted_empty_is_used_again_and_has_another_identity",
        ],
    ),
    "I12": (
        "what a lookup finds is a leading run, and whole, while others evict",
        [
            MODEL,
            CLIENT + "whatever_is_found_can_be_read_while_others_write_and_evict",
            "cache_store.test_client_crashes."
            "test_a_reader_reads_all_that_it_found_whoever_needs_room_between_any_two_of_its_commands",
        ],
    ),
    "I13": (
        "of two writers of a block one writes and the others follow",
        [MODEL, FUNCTIONS + "of_two_writers_of_one_block_one_writes_and_the_other_follows"],
    ),
    "I14": (
        "after a death between any two commands the books add up, at once and after reaping",
        [
            CRASHES,
            CLIENT_CRASHES,
            "cache_store.test_client_crashes."
            "test_two_writers_die_at_any_command_under_a_reader_and_nothing_is_wrong_or_lost",
            "cache_store.test_client_crashes."
            "test_a_server_that_loses_something_between_any_two_commands_costs_misses_only",
        ],
    ),
    "I15": ("time comes from Redis", [FUNCTIONS + "time_comes_from_redis_and_not_from_workers"]),
    "I16": (
        "a frame that is not exactly the one asked for is a miss and a count, never data",
        [
            "cache_store.test_frames.test_no_damage_goes_unnoticed",
            "cache_store.test_frames."
            "test_a_field_that_says_otherwise_is_refused_by_name_even_under_a_right_checksum",
            "cache_store.test_frames.test_a_frame_that_is_cut_anywhere_is_truncated_whatever_comes_after_it",
            CLIENT + "a_bad_payload_is_a_miss_and_a_counter_and_never_data",
            CLIENT + "a_sound_frame_put_in_the_place_of_another_is_a_miss",
            CLIENT + "an_old_frame_put_back_under_its_old_name_is_found_by_nobody",
            QUARANTINE + "what_follows_wrong_values_is_gone_for_good_whoever_writes_the_block_again",
        ],
    ),
    "I17": (
        "tenants of different salts and different models share no block, and cannot tell another's from none",
        [
            TENANTS + "two_tenants_have_no_block_in_common",
            TENANTS + "a_model_is_not_a_salt_and_a_salt_no_model",
            TENANTS + "a_tenant_never_finds_what_another_has_stored_and_has_its_own_beside_it",
            TENANTS + "a_foreign_block_and_one_that_nobody_has_cost_the_same_commands_and_bytes",
            "worker.test_fingerprint.test_everything_that_kv_depends_on_changes_the_fingerprint",
        ],
    ),
    "I18": (
        "Redis evicts in the order of the pure policy",
        [MODEL, "cache_store.test_eviction.test_redis_keeps_the_same_blocks_as_the_pure_policy"],
    ),
    "I19": (
        "with the store down or slow a request is not later than recomputing and 5 ms, and nothing is raised",
        [
            "worker.test_loads.test_a_dead_store_costs_a_few_steps_more_and_five_milliseconds",
            "worker.test_loads.test_however_the_store_behaves_no_request_is_later_than_without_it",
            "worker.test_store_tier."
            "test_redis_killed_in_the_middle_of_loads_and_writes_costs_misses_and_nothing_else",
            CLIENT
            + "a_store_that_is_not_there_answers_every_call_with_nothing_and_soon_without_asking",
            "cache_store.test_failover.test_a_server_that_takes_no_functions_costs_misses_until_it_does",
        ],
    ),
    "I20": (
        "under a storm of writes Redis' memory stays within the capacity and what is being written",
        [
            "cache_store.test_invariants.test_under_a_storm_of_writes_memory_stays_within_the_capacity",
            "cache_store.test_service.test_above_85_percent_it_evicts_to_80_percent_and_below_nothing",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INVARIANTS)
def test_every_test_that_is_said_to_prove_something_is_there(name: str) -> None:
    for path in INVARIANTS[name][1]:
        module, _, test = path.rpartition(".")
        assert callable(getattr(import_module(f"tests.{module}"), test, None)), path


def test_under_a_storm_of_writes_memory_stays_within_the_capacity(redis_server: LocalRedis) -> None:
    size, at_once, writers = 64 << 10, 8, 4
    format = FrameFormat(b"f" * 16, 2, 16, size)
    block_bytes = stored_bytes(format.frame_bytes)
    capacity = 200 * block_bytes
    stores = [BlockStore(redis_server.socket_url, format, capacity=capacity) for _ in range(writers)]
    with Redis.from_url(redis_server.socket_url) as redis:
        before = redis.info("memory")["used_memory"]

        def storm(number: int) -> None:
            for i in range(60):
                stores[number].write(to_write(chain(f"{number}/{i}", at_once), size))

        threads = [threading.Thread(target=storm, args=(number,)) for number in range(writers)]
        for thread in threads:
            thread.start()
        most = 0
        while any(thread.is_alive() for thread in threads):
            most = max(most, redis.info("memory")["used_memory"] - before)
        for thread, store in zip(threads, stores, strict=True):
            thread.join()
            store.close()
    assert most > 0.9 * capacity, "a storm it was"
    # Beside the capacity: what is received or not yet unlinked, of every writer a batch each, and buffers.
    under_way = writers * at_once * block_bytes
    assert most < capacity + 2 * under_way
