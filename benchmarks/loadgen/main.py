"""The command: check options and server, warm up, run, report."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec
import uvloop

from .environment import environment_of
from .http import BadAnswer, ConnectionFailed, HttpClient
from .options import DEFAULT_VOCAB_SIZE, Options, parse
from .pace import ClosedLoop, Run
from .progress import show_progress
from .prompts import RequestWriter, Vocabulary
from .record import Sender
from .report import Report
from .stream import one_line
from .summary import failed, summarise
from .table import render
from .workload import warmup_prompts

WARMUP_CONCURRENCY = 8


class CannotStart(Exception):
    """The run cannot begin; the message says why in one line."""


class ServedModel(msgspec.Struct):
    """An entry of /v1/models. Servers add fields: these two we use where they are."""

    id: str
    max_model_len: int | None = None
    vocab_size: int | None = None


class ModelList(msgspec.Struct):
    data: list[ServedModel]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 passed, 1 too many errors, 2 could not start, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    _allow_many_connections()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            report, run = runner.run(_measure(options, argv))
        except CannotStart as error:
            return _say(f"error: {error}", 2)
        except KeyboardInterrupt:  # before the run began
            return 130
    print(render(report), end="")
    try:
        _write_files(options, report, run)
    except OSError as error:
        return _say(f"error: {error}", 2)
    if report.interrupted:
        return 130
    reason = failed(report, options.max_error_rate)
    return 0 if reason is None else _say(f"failed: {reason}", 1)


def _say(message: str, status: int) -> int:
    print(f"serve.py: {message}", file=sys.stderr)
    return status


async def _measure(options: Options, argv: Sequence[str]) -> tuple[Report, Run]:
    client = HttpClient(options.address, os.environ.get("OPENAI_API_KEY", "").strip())
    try:
        model = await _served_model(client, options)
        writer = _writer(options, model)
        keep_text = options.api == "chat"  # the next turn repeats it
        sender = Sender(client, writer.path, options.timeout_s, options.verify, keep_text)
        if options.warmup:
            await _warm_up(options, Run(sender, writer))
        run = Run(sender, writer, options.seed, options.duration_s)
        started = datetime.now(UTC)
        cpu_s = time.process_time()
        interrupted = await _until_done_or_interrupted(run, options)
        cpu_s = time.process_time() - cpu_s
    finally:
        client.close()
    report = summarise(
        run.records,
        environment_of(options, model.id, argv, started),
        options.terms,
        start_s=run.start_s,
        cpu_s=cpu_s,
        peak_in_flight=run.peak_in_flight,
        turns_not_sent=run.turns_not_sent,
        interrupted=interrupted,
    )
    return report, run


async def _until_done_or_interrupted(run: Run, options: Options) -> bool:
    """True if SIGINT or SIGTERM ended the run before its time."""
    loop = asyncio.get_running_loop()
    interrupted = False
    playing = asyncio.create_task(run.play(options.workload.sessions, options.pace))

    def stop() -> None:
        nonlocal interrupted
        interrupted = True
        playing.cancel()

    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, stop)
    progress = asyncio.create_task(show_progress(run, options.workload.requests, sys.stderr))
    try:
        await playing
    except asyncio.CancelledError:
        if not interrupted:
            raise
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
        progress.cancel()
    await asyncio.wait([progress])
    return interrupted


async def _warm_up(options: Options, run: Run) -> None:
    """Requests whose prompts no measured one shares. Raises CannotStart if one fails."""
    workload = warmup_prompts(options.seed, options.warmup, *options.warmup_tokens)
    await run.play(workload.sessions, ClosedLoop(min(options.warmup, WARMUP_CONCURRENCY)))
    for record in run.records:
        if record.outcome != "ok":
            raise CannotStart(f"a warm-up request failed: {record.error}")


async def _served_model(client: HttpClient, options: Options) -> ServedModel:
    """The model to ask for. Raises CannotStart if the server or the model is not there."""
    try:
        async with asyncio.timeout(min(options.timeout_s, 30)):
            answer = await client.get("/v1/models")
        if answer.status == 404 and options.model is not None:
            return ServedModel(options.model)
        if answer.status != 200:
            raise CannotStart(f"{options.address}/v1/models answers HTTP {answer.status}")
        models = msgspec.json.decode(answer.body, type=ModelList).data
    except (ConnectionFailed, BadAnswer, msgspec.DecodeError) as error:
        raise CannotStart(f"{options.address}: {error}") from None
    except TimeoutError:
        raise CannotStart(f"{options.address}/v1/models does not answer") from None
    names = one_line(", ".join(model.id for model in models)) or "none"
    if options.model is not None:
        for model in models:
            if model.id == options.model:
                return model
        raise CannotStart(f"{options.address} has no model {options.model!r}, it has: {names}")
    if len(models) != 1:
        raise CannotStart(f"{options.address} has {len(models)} models, choose by --model: {names}")
    return models[0]


def _writer(options: Options, model: ServedModel) -> RequestWriter:
    """Raises CannotStart if the prompts do not fit the model."""
    vocab_size = options.vocab_size or min(DEFAULT_VOCAB_SIZE, model.vocab_size or DEFAULT_VOCAB_SIZE)
    if model.vocab_size is not None and vocab_size > model.vocab_size:
        raise CannotStart(f"--vocab-size {vocab_size} is above the model's {model.vocab_size}")
    longest = options.workload.longest_tokens
    if options.api == "completions" and model.max_model_len is not None and longest > model.max_model_len:
        raise CannotStart(
            f"the longest request may have {longest} tokens with its answer, {model.id} takes "
            f"{model.max_model_len}: use shorter lengths, or --length-scale for a trace"
        )
    return RequestWriter(
        api=options.api,
        model=model.id,
        vocabulary=Vocabulary(options.seed, vocab_size),
        ignore_eos=options.ignore_eos,
        count_tokens=options.verify,
        extra=options.extra,
    )


def _allow_many_connections() -> None:
    """Every request under way is a socket: use what the system allows this process."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _write_files(options: Options, report: Report, run: Run) -> None:
    """What was asked for. Never half a JSON: an older file stays until the new one is complete."""
    if options.json_path is not None:
        partial = options.json_path.with_name(options.json_path.name + ".partial")
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
        partial.replace(options.json_path)
    if options.plot_path is not None:
        from .plot import draw  # matplotlib takes a second to import and need not be installed

        draw(report, run.records, run.start_s, options.plot_path)
