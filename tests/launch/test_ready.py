from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from services.launch.ray_host import _cause
from services.launch.ready import banner, wait_for_workers


class Router(BaseHTTPRequestHandler):
    """Answers as a router whose workers become ready one a question."""

    ready = 0
    keys: tuple[str | None, ...] = (None,)

    def do_GET(self) -> None:
        status, body = 200, {}
        if self.path == "/ready":
            body = {"ready_workers": Router.ready}
            status = 200 if Router.ready else 503
            Router.ready += 1
        elif self.headers["authorization"] in Router.keys:
            body = {"data": [{"id": "tiny"}]}
        else:
            status = 401
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def router() -> Iterator[str]:
    Router.ready, Router.keys = 0, (None,)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Router)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


async def test_all_workers_must_be_ready(router: str) -> None:
    await wait_for_workers(router, 2)
    assert Router.ready == 3  # it was told 0, 1 and 2


def test_the_banner_names_what_can_be_asked(router: str, tmp_path: Path) -> None:
    text = banner(router, {"worker": ["http://one/metrics", "http://two/metrics"]}, tmp_path)
    assert f"Reprise serves tiny at {router}/v1" in text
    assert "http://one/metrics  http://two/metrics" in text
    assert "authorization" not in text


def test_with_api_keys_the_banner_shows_where_one_goes_but_not_the_key(
    router: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Router.keys = ("Bearer first",)
    monkeypatch.setenv("REPRISE_API_KEYS", "first,second")
    text = banner(router, {}, tmp_path)
    assert "-H 'authorization: Bearer <one of REPRISE_API_KEYS>'" in text
    assert "first" not in text


def test_the_cause_is_the_exception_at_the_end_of_serves_message() -> None:
    message = (
        "The deployment failed to start:\nTraceback\n  File x\nservices.worker.ModelError: no such file\n"
    )
    assert _cause(message) == "ModelError: no such file"
    assert _cause("") == "the workers could not be started"
