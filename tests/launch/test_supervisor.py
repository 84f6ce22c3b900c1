from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from services.launch import supervisor
from services.launch.supervisor import Child, ChildExited, StopRequested, Supervisor, session_members
from tests.fakes.until import until


def start(supervisor: Supervisor, character: str, piped: bool = False) -> Child:
    return supervisor.start(character, "tests.launch.child", character, environment=os.environ, piped=piped)


async def test_leaving_the_supervisor_stops_the_last_started_child_first(tmp_path: Path) -> None:
    async with Supervisor(tmp_path) as children:
        first, second = start(children, "first"), start(children, "second")
        order = []
        for child in (first, second):
            asyncio.create_task(child.ended()).add_done_callback(lambda _, child=child: order.append(child))
        await asyncio.sleep(0)
    assert order == [second, first]
    assert first.process.returncode == second.process.returncode == -signal.SIGTERM


async def test_a_child_that_ends_is_reported_by_name_with_its_last_words(tmp_path: Path) -> None:
    async with Supervisor(tmp_path) as children:
        start(children, "steady")
        start(children, "crashing")
        with pytest.raises(ChildExited) as caught:
            await children.watch(asyncio.sleep(60))
    assert str(caught.value).splitlines() == [
        "crashing stopped (exit code 3)",
        "    I am crashing",
        "    something is wrong",
    ]


async def test_a_child_that_was_killed_is_reported_with_the_signal(tmp_path: Path) -> None:
    async with Supervisor(tmp_path) as children:
        child = start(children, "steady")
        os.kill(child.process.pid, signal.SIGKILL)
        with pytest.raises(ChildExited, match=r"steady stopped \(signal SIGKILL\)"):
            await children.watch(asyncio.sleep(60))


@pytest.mark.parametrize("number", supervisor.STOP_SIGNALS)
async def test_a_signal_ends_what_is_waited_for(tmp_path: Path, number: signal.Signals) -> None:
    async with Supervisor(tmp_path) as children:
        child = start(children, "steady")
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), number)
        with pytest.raises(StopRequested):
            await children.watch(asyncio.sleep(60))
    assert child.process.returncode == -signal.SIGTERM


async def test_watching_returns_what_was_waited_for(tmp_path: Path) -> None:
    async with Supervisor(tmp_path) as children:
        start(children, "steady")
        assert await children.watch(asyncio.sleep(0, "result")) == "result"


async def test_the_children_of_a_child_are_stopped_too(tmp_path: Path) -> None:
    async with Supervisor(tmp_path) as children:
        child = start(children, "parent")
        await until(lambda: "ready" in child.log.read_text())
        assert len(session_members(child.process.pid)) == 2
    assert session_members(child.process.pid) == []


async def test_a_child_that_ignores_sigterm_is_killed_after_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "STOP_TIMEOUT_S", 0.2)
    async with Supervisor(tmp_path) as children:
        child = start(children, "stubborn")
        await until(lambda: "ready" in child.log.read_text())
    assert child.process.returncode == -signal.SIGKILL


async def test_a_second_signal_kills_at_once(tmp_path: Path) -> None:
    async with Supervisor(tmp_path) as children:
        child = start(children, "stubborn")
        await until(lambda: "ready" in child.log.read_text())
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(StopRequested):
            await children.watch(asyncio.sleep(60))
        asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), signal.SIGINT)
        begin = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - begin < supervisor.STOP_TIMEOUT_S / 2
    assert child.process.returncode == -signal.SIGKILL


async def test_a_piped_child_speaks_to_us_and_not_to_its_log(tmp_path: Path) -> None:
    async with Supervisor(tmp_path) as children:
        child = start(children, "talkative", piped=True)
        assert child.process.stdout is not None
        assert await asyncio.to_thread(child.process.stdout.readline) == b"I am talkative\n"
        child.process.stdout.close()
    assert child.log.read_text() == ""


async def test_children_end_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    async with Supervisor(tmp_path) as children:
        parent = start(children, "supervisor")
        await until(lambda: len(parent.log.read_text().splitlines()) == 2)
        pid = int(parent.log.read_text().splitlines()[1])
        assert session_members(pid) == [pid]
        parent.process.kill()
        await until(lambda: session_members(pid) == [])
