"""When the router can serve, and what to tell the user then."""

from __future__ import annotations

import asyncio
import json
import os
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

POLL_S = 0.1


async def wait_for_workers(router: str, workers: int) -> None:
    """Return when the router at the URL `router` has `workers` workers ready."""
    while await asyncio.to_thread(_ready_workers, router) < workers:  # noqa: ASYNC110  over HTTP: poll
        await asyncio.sleep(POLL_S)


def _ready_workers(router: str) -> int:
    try:
        count: int = _get(f"{router}/ready")["ready_workers"]
    except OSError:  # not listening yet, or 503
        return 0
    return count


def banner(router: str, metrics: dict[str, Sequence[str]], logs: Path) -> str:
    """`metrics` maps a part to the URLs of its metrics."""
    model = _get(f"{router}/v1/models")["data"][0]["id"]
    messages = [{"role": "user", "content": "What is a prefix cache?"}]
    request = {"model": model, "max_tokens": 64, "messages": messages}
    key = " -H 'authorization: Bearer <one of REPRISE_API_KEYS>'" if _api_key() else ""
    lines = [
        "",
        f"Reprise serves {model} at {router}/v1",
        "",
        f"  curl {router}/v1/chat/completions -H 'content-type: application/json'{key} \\",
        f"    -d '{json.dumps(request)}'",
        "",
        *(f"  {f'{part} metrics':<20} {'  '.join(urls)}" for part, urls in metrics.items()),
        f"  {'API documentation':<20} {router}/docs",
        f"  {'logs':<20} {logs}",
        "",
        "Ctrl-C stops all of it.",
    ]
    return "\n".join(lines)


def _api_key() -> str:
    return os.environ.get("REPRISE_API_KEYS", "").replace(",", " ").partition(" ")[0]


def _get(url: str) -> Any:
    headers = {"authorization": f"Bearer {key}"} if (key := _api_key()) else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as answer:
        return json.load(answer)
