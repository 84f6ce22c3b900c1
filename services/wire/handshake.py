"""How the two ends of a channel prove to each other that they know the deployment's secret.

    worker -> router   Challenge(protocol, worker nonce)
    router -> worker   Auth(protocol, router nonce, HMAC-SHA256(secret, "router" + both nonces))
    worker -> router   Hello(…, HMAC-SHA256(secret, "worker" + both nonces)) or Refused(reason)

The labels keep a proof of one end from being reflected as the other's; nonces have one length, so that the
concatenation has one reading. The secret itself never travels. The channel is not encrypted: a network that
others can listen to needs TLS around it.
"""

from __future__ import annotations

import hmac
import secrets
from ipaddress import ip_address

from services.wire.messages import PROTOCOL_VERSION

NONCE_BYTES = 32


class HandshakeError(Exception):
    """The peers cannot talk to each other; the message says why and what to change."""


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def router_proof(secret: bytes, worker_nonce: bytes, router_nonce: bytes) -> bytes:
    return hmac.digest(secret, b"router" + worker_nonce + router_nonce, "sha256")


def worker_proof(secret: bytes, router_nonce: bytes, worker_nonce: bytes) -> bytes:
    return hmac.digest(secret, b"worker" + router_nonce + worker_nonce, "sha256")


def check_peer(peer: str, protocol: int, nonce: bytes) -> None:
    """Raise HandshakeError unless `peer` speaks our protocol version with a nonce of the right length."""
    if protocol != PROTOCOL_VERSION:
        raise HandshakeError(
            f"{peer} speaks channel protocol version {protocol}, this end speaks version {PROTOCOL_VERSION}: "
            "run the same release on both"
        )
    if len(nonce) != NONCE_BYTES:
        raise HandshakeError(f"{peer} sent a nonce of {len(nonce)} bytes, not {NONCE_BYTES}")


def check_proof(peer: str, proof: bytes, expected: bytes) -> None:
    """Raise HandshakeError unless the proof is right. Takes the same time whatever the proof."""
    if not hmac.compare_digest(proof, expected):
        raise HandshakeError(f"{peer} does not know the channel secret of this end")


def check_bind(host: str, secret: bytes) -> None:
    """Raise ValueError for an open port without a secret: only loopback may do without one."""
    if not secret and not _is_loopback(host):
        raise ValueError(f"a channel secret is required to listen on {host}; only loopback does without")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
