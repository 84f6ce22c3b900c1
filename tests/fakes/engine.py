"""An engine that computes nothing: scripted tokens, simulated times, a true prefix cache, failures on order.

Steps like a small real one: requests wait, are prefilled one after the other while decodes stand still, then
get one token a step together. Blocks of prompts and of finished answers stay cached by their true hashes,
least recently used out first.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass

from services.wire.hashes import chain_hashes, pack_tokens
from services.wire.messages import Finish, FinishReason, Logprob, Start, Stats
from services.worker.request import Output, Request, RequestError, StepListener, StepReport
from tests.fakes.text import EOS, FAKE_VOCAB

#: The reply when none is given: repeats until `max_tokens`.
ENDLESS = b"The quick brown fox jumps over the lazy dog. "

Reply = str | Callable[[Request], Iterable[int]] | None


@dataclass(slots=True)
class _Run:
    request: Request
    script: Iterator[int]
    tokens: list[int]  # generated, those before this engine included


class FakeEngine:
    """`EngineLike` over a script.

    `reply`: a text that ends with EOS, a function from request to the token ids that follow its own (then EOS
    follows), or None for an endless one. `step_s` and `prefill_tokens_per_s` are simulated times and may be
    changed while it runs.
    """

    def __init__(
        self,
        reply: Reply = None,
        *,
        step_s: float = 0.0,
        prefill_tokens_per_s: float = 1e9,
        block_size: int = 16,
        gpu_blocks: int = 4096,
        max_running: int = 256,
        max_model_len: int = 8192,
        max_step_tokens: int = 512,
    ) -> None:
        self.reply = reply
        self.step_s = step_s
        self.prefill_tokens_per_s = prefill_tokens_per_s
        self.block_size = block_size
        self.gpu_blocks = gpu_blocks
        self.max_running = max_running
        self.max_model_len = max_model_len
        self.max_step_tokens = max_step_tokens  # said to routers; prompts are prefilled whole
        self.submitted: list[Request] = []  # all that was ever taken
        self.cancelled: list[Hashable] = []  # all that was ever asked to stop
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._reset()

    def _reset(self) -> None:
        self._waiting: OrderedDict[Hashable, Request] = OrderedDict()
        self._running: dict[Hashable, _Run] = {}
        self._to_cancel: set[Hashable] = set()
        self._cache: OrderedDict[bytes, None] = OrderedDict()
        self._stored: list[bytes] = []
        self._removed: list[bytes] = []
        self._stalled = False
        self._crash = False
        self._stopping = False
        self._fail_message = ""

    # ---- failures --------------------------------------------------------------------------------

    def stall(self) -> None:
        """Stop stepping until `resume`."""
        self._set(_stalled=True)

    def resume(self) -> None:
        self._set(_stalled=False)

    def crash(self) -> None:
        """End the engine's thread as a bug would: nothing finishes any more."""
        self._set(_crash=True)

    def fail_running(self, message: str) -> None:
        """End the requests of the next step with an internal error."""
        self._set(_fail_message=message)

    def _set(self, **state: object) -> None:
        with self._changed:
            for name, value in state.items():
                setattr(self, name, value)
            self._changed.notify()

    # ---- EngineLike ------------------------------------------------------------------------------

    def start(self, listener: StepListener) -> None:
        """Begin, or begin again after `stop` with nothing left of before."""
        self._reset()
        self._listener = listener
        self._thread = threading.Thread(target=self._loop, name="fake-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        limit = self.max_model_len - 1
        if not 1 <= len(request.tokens) <= limit:
            raise RequestError(f"prompt must have 1 to {limit} tokens, got {len(request.tokens)}")
        if (largest := max(request.tokens)) >= FAKE_VOCAB:
            raise RequestError(f"token id must be below {FAKE_VOCAB}, got {largest}")
        with self._changed:
            self.submitted.append(request)
            self._waiting[request.key] = request
            self._changed.notify()

    def cancel(self, key: Hashable) -> None:
        with self._changed:
            self.cancelled.append(key)
            if key in self._waiting or key in self._running:
                self._to_cancel.add(key)
                self._changed.notify()

    def drain(self) -> None:
        """The server refuses new requests by itself."""

    @property
    def idle(self) -> bool:
        with self._changed:
            return not self._waiting and not self._running

    def stats(self) -> Stats:
        with self._changed:
            return self._stats()

    def healthy(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._stalled

    def stop(self) -> None:
        self._set(_stopping=True)
        if self._thread:
            self._thread.join()

    # ---- the loop --------------------------------------------------------------------------------

    def _loop(self) -> None:
        next_step_s = time.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                if self._stopping or self._crash:
                    return
                outputs = self._take_cancelled()
                request = self._admit()
            early_s = next_step_s - time.monotonic()
            if request:
                outputs.append(self._prefill(request))
            elif early_s <= 0:
                outputs += self._decode()
                next_step_s = max(next_step_s + self.step_s, time.monotonic())
            elif not outputs:
                with self._changed:
                    self._changed.wait_for(self._is_interrupted, timeout=early_s)
                continue
            self._report(outputs)

    def _has_work(self) -> bool:
        work = self._waiting or self._running or self._to_cancel
        return bool(self._stopping or self._crash or (work and not self._stalled))

    def _is_interrupted(self) -> bool:
        room = len(self._running) < self.max_running
        stopped = self._stopping or self._crash or self._stalled
        return bool(stopped or self._to_cancel or (self._waiting and room))

    def _take_cancelled(self) -> list[Output]:
        keys, self._to_cancel = self._to_cancel, set()
        live = [key for key in keys if self._waiting.pop(key, None) or self._running.pop(key, None)]
        return [Output(key, finish=Finish("cancelled")) for key in live]

    def _admit(self) -> Request | None:
        if not self._waiting or len(self._running) >= self.max_running:
            return None
        key, request = self._waiting.popitem(last=False)
        generated = list(request.tokens[request.prompt_length :])
        self._running[key] = _Run(request, self._script(request), generated)
        return request

    def _script(self, request: Request) -> Iterator[int]:
        if callable(self.reply):
            return itertools.chain(self.reply(request), itertools.repeat(EOS))
        whole = itertools.cycle(ENDLESS) if self.reply is None else iter(self.reply.encode())
        rest = itertools.islice(whole, request.generated, None)
        return itertools.chain(rest, itertools.repeat(EOS))

    def _prefill(self, request: Request) -> Output:
        started_s = time.monotonic()
        prompt_tokens = len(request.tokens)
        reusable = list(request.hashes[: (prompt_tokens - 1) // self.block_size])
        hits = list(itertools.takewhile(self._cache.__contains__, reusable))
        hit_tokens = len(hits) * self.block_size
        self._keep(request.hashes)
        seconds = (prompt_tokens - hit_tokens) / self.prefill_tokens_per_s
        if seconds > 1e-4:
            time.sleep(seconds)
        start = Start(
            prompt_tokens=prompt_tokens,
            gpu_tokens=hit_tokens,
            host_tokens=0,
            store_tokens=0,
            queue_s=max(0.0, started_s - request.arrival_s),
            prefill_s=time.monotonic() - started_s,
        )
        return self._next(self._running[request.key], start)

    def _decode(self) -> list[Output]:
        if message := self._fail_message:
            self._fail_message = ""
            failed = [Output(key, finish=Finish("error", message=message)) for key in self._running]
            self._running.clear()
            return failed
        return [self._next(run) for run in list(self._running.values())]

    def _next(self, run: _Run, start: Start | None = None) -> Output:
        sampling = run.request.sampling
        token = next(run.script)
        stop = token in sampling.stop_token_ids or (token == EOS and not sampling.ignore_eos)
        if stop and len(run.tokens) >= sampling.min_tokens:
            self._finish(run)
            return Output(run.request.key, start=start, finish=Finish("stop", stop_token=token))
        run.tokens.append(token)
        logprobs: tuple[Logprob, ...] = ()
        if sampling.logprobs >= 0:
            top = tuple(((token + n) % FAKE_VOCAB, -0.5 - n) for n in range(sampling.logprobs))
            logprobs = (Logprob(-0.5, top),)
        reason: FinishReason | None = None
        length = run.request.prompt_length + len(run.tokens)
        if len(run.tokens) >= sampling.max_tokens or length >= self.max_model_len:
            reason = "length"
            self._finish(run)
        return Output(run.request.key, (token,), start, logprobs, Finish(reason) if reason else None)

    def _finish(self, run: _Run) -> None:
        """The answer's full blocks stay for the next turn."""
        del self._running[run.request.key]
        request = run.request
        full = len(request.hashes)
        parent = request.hashes[-1] if full else request.root
        rest = [*request.tokens[: request.prompt_length], *run.tokens][full * self.block_size :]
        self._keep(chain_hashes(parent, pack_tokens(rest), self.block_size))

    def _keep(self, hashes: Iterable[bytes]) -> None:
        for block in hashes:
            if block not in self._cache:
                self._stored.append(block)
            self._cache[block] = None
            self._cache.move_to_end(block)
        while len(self._cache) > self.gpu_blocks:
            self._removed.append(self._cache.popitem(last=False)[0])

    def _report(self, outputs: list[Output]) -> None:
        stored = [block for block in self._stored if block in self._cache]
        removed, self._stored, self._removed = self._removed, [], []
        with self._changed:
            stats = self._stats()
        self._listener(
            StepReport(
                outputs,
                stored={"gpu": stored} if stored else {},
                removed={"gpu": removed} if removed else {},
                stats=stats,
            )
        )

    def _stats(self) -> Stats:
        blocks = sum(len(run.request.hashes) + 1 for run in list(self._running.values()))
        return Stats(
            running=len(self._running),
            waiting=len(self._waiting),
            queued_prefill_tokens=sum(len(request.tokens) for request in self._waiting.values()),
            free_blocks=max(0, self.gpu_blocks - blocks),
            prefill_tokens_per_s=self.prefill_tokens_per_s,
            decode_step_s=self.step_s,
            store_tokens_per_s=0.0,
        )
