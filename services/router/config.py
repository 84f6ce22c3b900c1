"""Everything that can be set on a router, validated once."""

from __future__ import annotations

from dataclasses import dataclass

from services.router.answer.families import CallStyle


@dataclass(frozen=True)
class RouterConfig:
    """Bounds and secrets of one router. Times are in seconds."""

    channel_secret: bytes = b""  # shared with the workers; empty only on loopback
    salt_secret: bytes | None = None  # tenants' cache salts; None: the channel secret
    api_keys: tuple[str, ...] = ()  # none: everybody may ask
    max_queue: int = 1024  # requests waiting for a worker, a model
    queue_timeout_s: float = 60.0  # longest wait for a worker
    stall_timeout_s: float = 300.0  # longest silence of a worker about a request it has
    max_body_bytes: int = 8 * 1024 * 1024
    body_timeout_s: float = 30.0
    max_pending_tokens: int = 16_384  # generated, but not taken by a slow client
    tool_call_parser: CallStyle | None = None  # None: as each model's chat template tells
    thinks: bool | None = None  # whether models write thoughts; None: as each template tells

    def __post_init__(self) -> None:
        for name, least in (
            ("max_queue", 0),
            ("queue_timeout_s", 0),
            ("stall_timeout_s", 0),
            ("max_body_bytes", 1024),
            ("body_timeout_s", 0),
            ("max_pending_tokens", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
