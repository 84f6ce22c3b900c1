"""One connection to Redis that payloads travel on, written for large values and nothing else.

redis-py reads a reply through growing buffers into a new `bytes` object and copies a value three times on its
way out. Here `sendmsg` takes the caller's memory and `recvmsg_into` fills it: no byte of a payload is touched
by Python. The protocol is RESP2 (https://redis.io/docs/latest/develop/reference/protocol-spec), of which only
what SET, GET, AUTH and SELECT answer is understood; anything else is an error and the connection is not to be
used again. Over TLS the socket offers neither call: buffers go one by one.

A plain socket blocks in the kernel, with the kernel's timeouts: Python's own would ask `poll` before each
call, and the kernel can wait for the whole of a value, where a server with 200 KiB of send buffer would wake
the reader up for every part of it.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Sequence
from contextlib import suppress

from redis.exceptions import InvalidResponse, ResponseError

from services.cache_store.address import Address

#: Read beyond a payload, so that its line end and the next reply's first line cost no call of their own.
#: Small, because what belongs to the next payload is copied once more.
_AHEAD_BYTES = 4096

#: A transfer that is slower than this is given up even if bytes keep coming.
_LEAST_BYTES_PER_S = 1e6

#: A value too long for its place is read past up to this; beyond, the connection goes.
_MOST_SKIPPED_BYTES = 64 << 20

_MOST_BUFFERS = 256  # in one sendmsg; the system's limit is 1,024

Buffer = bytes | memoryview


class ServerRefused(ResponseError):
    """An error reply; `code` is its first word, such as OOM, MOVED, LOADING."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.code = text.partition(" ")[0]


class PayloadConnection:
    """A connected, authenticated socket. Not thread-safe but for `interrupt`.

    Every method raises OSError when the connection is broken or slow, RedisError when the server refuses or
    sends what it should not; then close it, for replies may be under way that nobody will read.
    """

    def __init__(self, address: Address, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._deadline = 0.0
        self._ahead_bytes = bytearray(_AHEAD_BYTES)
        self._ahead = memoryview(self._ahead_bytes)
        self._start = self._end = 0  # what of `_ahead` is received and not yet used
        self._socket = address.connect(timeout_s)
        self._plain = not isinstance(self._socket, ssl.SSLSocket)
        if self._plain:
            self._socket.settimeout(None)
            timeval = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6) or 1)
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self._socket.setsockopt(socket.SOL_SOCKET, option, timeval)
        try:
            self._greet(address)
        except BaseException:
            self.close()
            raise

    def expect(self, size: int) -> None:
        """A transfer of `size` bytes, both ways together, begins: it must not take for ever."""
        self._deadline = time.monotonic() + self._timeout_s + size / _LEAST_BYTES_PER_S

    def send(self, buffers: Sequence[Buffer]) -> None:
        """Send all of `buffers`, one after the other."""
        if not self._plain:
            for buffer in buffers:
                self._socket.sendall(buffer)
                self._check_time()
            return
        at, offset = 0, 0  # the first buffer not sent, and how much of it is
        while at < len(buffers):
            window = list(buffers[at : at + _MOST_BUFFERS])
            if offset:
                window[0] = memoryview(window[0])[offset:]
            try:
                sent = self._socket.sendmsg(window) + offset
            except BlockingIOError as error:
                raise TimeoutError("the server does not read") from error
            while at < len(buffers) and sent >= len(buffers[at]):
                sent -= len(buffers[at])
                at += 1
            offset = sent
            self._check_time()

    def status(self) -> None:
        """Read a reply that must be OK. Raises ServerRefused."""
        line = self._line()
        if line != b"+OK":
            raise _unexpected(line)

    def value(self, into: memoryview) -> int | None:
        """Read a value to the start of `into`: its length, None if there is no such value.

        A value longer than `into` is read past; its length is the answer and `into` holds nothing.
        """
        line = self._line()
        if line == b"$-1":
            return None
        if line[:1] != b"$" or not line[1:].isdigit():
            raise _unexpected(line)
        length = int(line[1:])
        if length <= len(into):
            self._receive(into[:length])
        elif length <= _MOST_SKIPPED_BYTES:
            self._skip(length)
        else:
            raise InvalidResponse(f"a value of {length} bytes where {len(into)} were expected")
        if self._line():
            raise InvalidResponse("a value longer than it said")
        return length

    def interrupt(self) -> None:
        """Make a call that another thread is in fail; the thread closes the connection itself."""
        with suppress(OSError):  # it was broken already
            # Not SSLSocket's own, which takes the TLS session away under the other thread's feet.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    # ---- inside

    def _greet(self, address: Address) -> None:
        self.expect(0)
        if address.username or address.password:
            user = [address.username] if address.username else []
            self._ask("AUTH", *user, address.password or "")
        if address.db:
            self._ask("SELECT", str(address.db))

    def _ask(self, *words: str) -> None:
        self.send([command(*(word.encode() for word in words))])
        self.status()

    def _line(self) -> bytes:
        """The next line, without its end."""
        searched = self._start
        while True:
            at = self._ahead_bytes.find(b"\r\n", searched, self._end)
            if at >= 0:
                line = bytes(self._ahead[self._start : at])
                self._start = at + 2
                return line
            searched = max(self._start, self._end - 1)
            if self._end == len(self._ahead):
                if not self._start:
                    raise InvalidResponse(f"no line within {_AHEAD_BYTES} bytes")
                left = self._end - self._start
                self._ahead[:left] = bytes(self._ahead[self._start : self._end])
                searched -= self._start
                self._start, self._end = 0, left
            self._end += self._receive_some([self._ahead[self._end :]])

    def _receive(self, into: memoryview) -> None:
        """Fill `into`."""
        got = min(len(into), self._end - self._start)
        into[:got] = self._ahead[self._start : self._start + got]
        self._start += got
        while got < len(into):
            # All that was ahead is used up. The line end that follows comes along, to where lines are read.
            self._start = self._end = 0
            if self._plain:
                received = self._receive_some([into[got:], self._ahead[:2]], socket.MSG_WAITALL)
                self._end = max(0, received - (len(into) - got))
            else:
                received = self._receive_some([into[got:]])
            got = min(len(into), got + received)

    def _skip(self, length: int) -> None:
        scratch = memoryview(bytearray(min(length, 1 << 20)))
        while length:
            self._receive(scratch[:length])
            length -= min(length, len(scratch))

    def _receive_some(self, into: list[memoryview], flags: int = 0) -> int:
        """Bytes received into `into`, at least one; over TLS a list of one."""
        try:
            if self._plain:
                received = self._socket.recvmsg_into(into, 0, flags)[0]
            else:
                received = self._socket.recv_into(into[0])
        except BlockingIOError as error:
            raise TimeoutError("no answer") from error
        if not received:
            raise ConnectionResetError("the server closed the connection")
        self._check_time()
        return received

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise TimeoutError("the transfer is too slow")


def command(*words: bytes) -> bytes:
    """A command as it is sent."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


def _unexpected(line: bytes) -> Exception:
    if line[:1] == b"-":
        return ServerRefused(line[1:].decode(errors="replace"))
    return InvalidResponse(f"unexpected reply {line[:40]!r}")
