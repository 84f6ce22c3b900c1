"""`python -m services.router` as a process."""

import json
import signal
import socket
import threading
import time
from http.client import HTTPConnection, IncompleteRead

import pytest

from services.router.__main__ import main
from tests.router.processes import fake_worker, router
from tests.router.serving import chat


def connect(url):
    return HTTPConnection(url.removeprefix("http://"), timeout=30)


def wait_ready(url):
    deadline = time.monotonic() + 20
    while True:
        connection = connect(url)
        connection.request("GET", "/ready")
        if connection.getresponse().status == 200:
            return
        assert time.monotonic() < deadline


def open_stream(url, **fields):
    connection = connect(url)
    body = json.dumps(chat(stream=True, **fields))
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    return connection.getresponse()


def test_a_taken_port_is_one_clear_line_and_exit_code_1(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--workers", "127.0.0.1:1", "--port", str(port)]) == 1
    out, err = capsys.readouterr()
    assert err.strip() == f"error: cannot listen on 127.0.0.1:{port}: Address already in use"
    assert out == ""


def test_the_largest_body_is_a_size_as_the_readme_writes_it():
    with fake_worker() as worker, router("--workers", worker, "--max-body", "1MiB") as (_, url):
        connection = connect(url)
        body = json.dumps(chat("x" * (1 << 20)))
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 413
        assert str(1 << 20) in answer.read().decode()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--workers host:port"),
        (("--workers", "nowhere"), "host:port, got 'nowhere'"),
        (("--workers", "a:1", "--max-queue", "-1"), "max_queue must be at least 0, got -1"),
        (("--workers", "a:1", "--port", "70000"), "must be from 0 to 65535"),
        (("--workers", "a:1", "--max-body", "much"), "must be a size above 0 such as 512MiB"),
        (("--workers", "a:1", "--secret-file", "/nonexistent"), "No such file"),
        (("--workers", "a:1", "--api-keys-file", "/dev/null"), "/dev/null holds no API key"),
    ],
)
def test_bad_options_are_one_clear_line_and_exit_code_2(options, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(list(options))
    assert end.value.code == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]


def test_on_sigterm_streams_finish_and_new_connections_are_refused():
    with fake_worker("--step-ms", "5") as worker, router("--workers", worker) as (process, url):
        wait_ready(url)
        stream = open_stream(url, max_tokens=200)
        stream.readline()
        process.send_signal(signal.SIGTERM)
        rest = stream.read()
        assert rest.endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason":"length"' in rest
        assert process.wait(timeout=20) == 0
        with pytest.raises(ConnectionRefusedError):
            connect(url).request("GET", "/health")


def test_at_the_drain_deadline_streams_end_with_an_error_event():
    options = ("--drain-timeout", "0.3")
    with fake_worker("--step-ms", "5") as worker, router("--workers", worker, *options) as (process, url):
        wait_ready(url)
        stream = open_stream(url)
        stream.readline()
        process.send_signal(signal.SIGINT)
        last = stream.read().strip().rsplit(b"\n\n", 1)[-1]
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "shutting_down"
        assert process.wait(timeout=20) == 0


def test_a_second_signal_ends_it_at_once():
    with fake_worker("--step-ms", "5") as worker, router("--workers", worker) as (process, url):
        wait_ready(url)
        stream = open_stream(url)
        stream.readline()
        process.send_signal(signal.SIGTERM)
        threading.Timer(0.3, process.send_signal, [signal.SIGTERM]).start()
        assert process.wait(timeout=20) == 128 + signal.SIGTERM
        with pytest.raises(IncompleteRead):
            stream.read()
