"""Child processes that live no longer than their parent: a log each, watched together, stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from services.process import die_with_parent

#: How long a child may take to stop after SIGTERM before it is killed.
STOP_TIMEOUT_S = 15.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAST_WORDS_LINES = 12

T = TypeVar("T")


class ChildExited(Exception):
    """A child ended by itself; the message says which, how, and what it wrote last."""


class StopRequested(Exception):
    """Somebody asked us to stop, or closed the terminal."""


@dataclass(frozen=True, eq=False)
class Child:
    """A process in a session of its own."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    async def ended(self) -> None:
        loop = asyncio.get_running_loop()
        event = asyncio.Event()
        descriptor = os.pidfd_open(self.process.pid)
        loop.add_reader(descriptor, event.set)
        try:
            await event.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)

    def exit_message(self) -> str:
        code = self.process.wait()
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        try:
            lines = self.log.read_text(errors="replace").rstrip().splitlines()[-LAST_WORDS_LINES:]
        except OSError:
            lines = []
        words = [f"{self.name} stopped ({how})", *(f"    {line}" for line in lines)]
        return "\n".join(words)


class Supervisor:
    """An async context manager: leaving it stops every child, last started first.

    The first of `STOP_SIGNALS` ends what `watch` waits for; one more while stopping kills what is left.
    """

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.children: list[Child] = []
        self._stop = asyncio.Event()
        self._kill = asyncio.Event()

    async def __aenter__(self) -> Supervisor:
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        return self

    async def __aexit__(self, *_: object) -> None:
        for child in reversed(self.children):
            await self._stop_child(child)

    def start(
        self, name: str, module: str, *arguments: str, environment: Mapping[str, str], piped: bool = False
    ) -> Child:
        """Run `python -m module arguments` with its output in a log; `piped`: its stdout comes to us instead.

        Its own session keeps a terminal's Ctrl-C from it: we are told, and stop our children in order. It is
        sent SIGTERM when we die, however that happens.
        """
        log = self.logs / f"{name.replace(' ', '-')}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else output,
                stderr=output,
                env=dict(environment),
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        return self.adopt(Child(name, process, log))

    def adopt(self, child: Child) -> Child:
        """Watch and stop a process that somebody else started for us, in a session of its own."""
        self.children.append(child)
        return child

    async def watch(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, unless a child ends first (ChildExited) or we must stop (StopRequested)."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stop.wait())
        ends = {asyncio.ensure_future(child.ended()): child for child in self.children}
        waiters = {task, stop, *ends}
        try:
            done, _ = await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
            if stop in done:
                raise StopRequested
            for ended in done & ends.keys():
                raise ChildExited(ends[ended].exit_message())
            return task.result()
        finally:
            for waiter in waiters:
                waiter.cancel()
            await asyncio.gather(*waiters, return_exceptions=True)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._kill.set()
        self._stop.set()

    async def _stop_child(self, child: Child) -> None:
        child.process.terminate()
        waiters = {asyncio.ensure_future(child.ended()), asyncio.ensure_future(self._kill.wait())}
        await asyncio.wait(waiters, timeout=STOP_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        for waiter in waiters:
            waiter.cancel()
        await asyncio.gather(*waiters, return_exceptions=True)
        while left := session_members(child.process.pid):  # the child itself, or what it left behind
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.01)
        child.process.wait()


def session_members(session: int) -> list[int]:
    """Ids of the live processes in a session (proc(5), stat: state, ppid, pgrp, session after the name)."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                members.append(int(stat.parent.name))
    return members
