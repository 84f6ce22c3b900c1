import socket
import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter

from services.worker.probes import ProbeServer


@pytest.fixture
def trouble():
    return {"reason": ""}


@pytest.fixture
def probes(trouble):
    registry = CollectorRegistry()
    Counter("things", "Things.", registry=registry).inc(3)
    server = ProbeServer("127.0.0.1", 0, registry, {"/health": lambda: trouble["reason"]})
    yield server
    server.stop()


def get(probes, path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{probes.port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_metrics_are_prometheus_text(probes):
    status, text = get(probes, "/metrics")
    assert status == 200
    assert "things_total 3.0" in text


def test_a_check_is_ok_or_503_with_the_reason(probes, trouble):
    assert get(probes, "/health") == (200, "ok\n")
    trouble["reason"] = "the engine does not step"
    assert get(probes, "/health") == (503, "the engine does not step\n")


def test_an_unknown_path_names_the_known_ones(probes):
    assert get(probes, "/") == (404, "there are /metrics, /health\n")


def test_a_taken_port_is_one_clear_error(probes):
    with pytest.raises(
        OSError, match=rf"cannot listen on 127\.0\.0\.1:{probes.port}: Address already in use"
    ):
        ProbeServer("127.0.0.1", probes.port, CollectorRegistry(), {})


def test_a_client_that_sends_nothing_or_nonsense_holds_nobody_up(probes, capfd):
    with (
        socket.create_connection(("127.0.0.1", probes.port)),
        socket.create_connection(("127.0.0.1", probes.port)) as nonsense,
    ):
        nonsense.sendall(b"\x16\x03\x01 not http\r\n\r\n")
        nonsense.shutdown(socket.SHUT_WR)
        assert get(probes, "/health") == (200, "ok\n")
        while nonsense.recv(4096):
            pass
    assert capfd.readouterr().err == ""


def test_after_stop_the_port_is_free():
    server = ProbeServer("127.0.0.1", 0, CollectorRegistry(), {})
    server.stop()
    ProbeServer("127.0.0.1", server.port, CollectorRegistry(), {}).stop()
