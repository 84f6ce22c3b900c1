"""Who asks, and what of the cache they share.

There is one tenant for now. This is the place where API keys become tenants, and tenants salts.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import sha256

from services.router.api.errors import ApiError

DEFAULT_TENANT = "default"


class Tenants:
    """Checks bearer keys and derives each tenant's cache salt from the deployment's secret."""

    def __init__(self, salt_secret: bytes, api_keys: Sequence[str] = ()) -> None:
        """Without `api_keys` everybody may ask. All routers of a deployment need the same `salt_secret`,
        or they share nothing."""
        self._secret = salt_secret
        self._keys = [_digest(key.encode()) for key in api_keys]

    def identify(self, authorization: bytes | None) -> str:
        """The tenant behind an Authorization header. Raises ApiError (401)."""
        if not self._keys:
            return DEFAULT_TENANT
        scheme, _, key = (authorization or b"").partition(b" ")
        given = _digest(key.strip())
        # All keys are compared, each in constant time: the time tells neither how much nor which matched.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if scheme.lower() == b"bearer" and any(matches):
            return DEFAULT_TENANT
        raise ApiError(
            401,
            "a valid API key is needed: Authorization: Bearer KEY",
            type="authentication_error",
            code="invalid_api_key",
            headers=(("www-authenticate", "Bearer"),),
        )

    def salt(self, tenant: str) -> bytes:
        """32 bytes that only this deployment can derive: who does not know them cannot name, and so not
        probe for, another tenant's blocks."""
        return hmac.digest(self._secret, b"tenant:" + tenant.encode(), "sha256")


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()
