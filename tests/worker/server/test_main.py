"""`python -m services.worker`: the ready line, signals and errors."""

import asyncio
import os
import re
import signal
import socket
import sys
import urllib.error
import urllib.request
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.worker import __main__ as command
from tests.fakes.checkpoint import write_tiny_checkpoint
from tests.fakes.until import until
from tests.worker.server.clients import routing_to

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny"))


@dataclass
class Running:
    process: asyncio.subprocess.Process
    host: str
    port: int
    metrics: str


@asynccontextmanager
async def running(model, *options):
    """A worker process that has said it is ready."""
    arguments = [
        "-m",
        "services.worker",
        "--model",
        model,
        "--name",
        "w0",
        "--kv-memory",
        "4MiB",
        "--threads",
        "1",
    ]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, *options, cwd=ROOT, stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"REPRISE_CHANNEL_SECRET": "shared"},
    )  # fmt: skip
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
        match = re.fullmatch(r"ready worker=w0 channel=(.+):(\d+) metrics=(http://.+/metrics)\n", line)
        yield Running(process, match[1], int(match[2]), match[3])
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_running_requests_finish_and_the_exit_code_is_0(model, number):
    async with running(model) as worker, routing_to(worker, b"shared") as router:
        answer = router.ask([1, 2, 3], max_tokens=300, ignore_eos=True)
        await until(lambda: answer.items)
        worker.process.send_signal(number)
        await until(lambda: router.drained)
        assert (await router.ask([4]).finished()).finish.error_kind == "draining"
        await answer.finished()
        assert len(answer.tokens) == 300
        assert await asyncio.wait_for(worker.process.wait(), 20) == 0


@pytest.mark.slow
async def test_a_signal_while_the_model_loads_ends_it_at_once(tmp_path):
    model = tmp_path / "endless.gguf"
    os.mkfifo(model)  # whoever opens it waits for a writer
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.worker", "--model", str(model), "--metrics-port", port), cwd=ROOT
    )
    try:
        await until(lambda: readiness(port) == "starting\n", timeout_s=60)
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 5) == 0
    finally:
        if process.returncode is None:
            process.kill()


def readiness(port):
    """What /ready says with its 503; None while nobody listens."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5)
    except urllib.error.HTTPError as error:
        return error.read().decode()
    except OSError:
        return None


@pytest.mark.slow
async def test_a_second_signal_ends_it_at_once(model):
    async with running(model, "--drain-timeout", "600") as worker, routing_to(worker, b"shared") as router:
        answers = [router.ask([n], max_tokens=1000, ignore_eos=True) for n in range(16)]
        await until(lambda: all(answer.items for answer in answers))
        worker.process.send_signal(signal.SIGTERM)
        await until(lambda: router.drained)
        worker.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(worker.process.wait(), 5) == 128 + signal.SIGTERM
        await until(lambda: all(answer.finish for answer in answers))
        assert "worker_lost" in {answer.finish.error_kind for answer in answers}


@pytest.mark.slow
async def test_a_drain_that_takes_too_long_is_cut_off(model):
    async with running(model, "--drain-timeout", "0") as worker, routing_to(worker, b"shared") as router:
        answers = [router.ask([n], max_tokens=1000, ignore_eos=True) for n in range(16)]
        await until(lambda: all(answer.items for answer in answers))
        worker.process.terminate()
        assert await asyncio.wait_for(worker.process.wait(), 20) == 0
        await until(lambda: all(answer.finish for answer in answers))
        assert "error" in {answer.finish.reason for answer in answers}


def run(capsys, *options):
    """Exit code and stderr of the command, run in this process."""
    try:
        code = command.main(list(options))
    except SystemExit as stop:  # argparse
        code = stop.code
    return code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the following arguments are required: --model"),
        (["--block-size", "24"], "block_size must be a power of two from 16 to 128, got 24"),
        (["--kv-memory", "1GB"], "--kv-memory: must be a size above 0 such as 512MiB or 1.5GiB, got '1GB'"),
        (["--kv-memory", "0"], "--kv-memory: must be a size above 0 such as 512MiB or 1.5GiB, got '0'"),
        (["--port", "70000"], "argument --port: must be from 0 to 65535, got '70000'"),
        (["--threads", "0"], "argument --threads: must be from 1 to 4096, got '0'"),
        (["--store-codec", "zip"], "argument --store-codec: invalid choice: 'zip'"),
        (["--max-running", "0"], "max_running must be at least 1, got 0"),
        (["--secret-file", "/no/such/file"], "No such file or directory: '/no/such/file'"),
        (["--secret-file", "/dev/null"], "--secret-file /dev/null is empty"),
    ],
)
def test_a_bad_option_is_named_with_its_limits_and_the_exit_code_is_2(capsys, options, message):
    model = ["--model", "/no/such/model"] if options else []
    code, lines = run(capsys, *model, *options)
    assert code == 2
    assert message in lines[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "model path /no/such/model does not exist"),
        (["--host", "0.0.0.0"], "a channel secret is required to listen on 0.0.0.0"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid:0: "),
    ],
)
def test_a_worker_that_cannot_start_says_why_in_one_line_and_the_exit_code_is_1(
    capsys, monkeypatch, options, message
):
    monkeypatch.delenv("REPRISE_CHANNEL_SECRET", raising=False)
    code, lines = run(capsys, "--model", "/no/such/model", *options)
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


@pytest.mark.parametrize("option", ["--port", "--metrics-port"])
def test_a_taken_port_is_one_line(capsys, option):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, lines = run(capsys, "--model", "/no/such/model", option, str(port))
    assert (code, lines) == (1, [f"error: cannot listen on 127.0.0.1:{port}: Address already in use"])
