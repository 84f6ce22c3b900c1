import pytest

from services.wire.handshake import (
    HandshakeError,
    check_bind,
    check_peer,
    check_proof,
    new_nonce,
    router_proof,
    worker_proof,
)
from services.wire.messages import PROTOCOL_VERSION


def test_a_proof_holds_for_one_secret_one_pair_of_nonces_and_one_end():
    ours, theirs = new_nonce(), new_nonce()
    proof = router_proof(b"secret", ours, theirs)
    check_proof("peer", proof, router_proof(b"secret", ours, theirs))
    for other in (
        router_proof(b"other", ours, theirs),
        router_proof(b"secret", theirs, ours),
        router_proof(b"secret", ours, new_nonce()),
        worker_proof(b"secret", ours, theirs),
        b"",
    ):
        with pytest.raises(HandshakeError, match="peer does not know the channel secret"):
            check_proof("peer", other, proof)


def test_a_peer_of_another_version_is_told_both_versions():
    with pytest.raises(HandshakeError, match=f"version 99, this end speaks version {PROTOCOL_VERSION}"):
        check_peer("peer", 99, new_nonce())


@pytest.mark.parametrize("length", [0, 31, 33, 1000])
def test_a_nonce_of_another_length_is_refused(length):
    with pytest.raises(HandshakeError, match=f"nonce of {length} bytes, not 32"):
        check_peer("peer", PROTOCOL_VERSION, b"n" * length)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "worker.example", ""])
def test_without_a_secret_only_loopback_may_be_listened_on(host):
    with pytest.raises(ValueError, match=f"secret is required to listen on {host}"):
        check_bind(host, b"")
    check_bind(host, b"secret")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_secret(host):
    check_bind(host, b"")
