import pytest

from services.router.api.errors import ApiError
from services.router.tenants import DEFAULT_TENANT, Tenants


def test_without_keys_everybody_is_the_default_tenant():
    tenants = Tenants(b"secret")
    assert tenants.identify(None) == DEFAULT_TENANT
    assert tenants.identify(b"Bearer whatever") == DEFAULT_TENANT


@pytest.mark.parametrize("header", [b"Bearer two", b"bearer  two ", b"BEARER one"])
def test_any_of_the_keys_opens(header):
    assert Tenants(b"", ["one", "two"]).identify(header) == DEFAULT_TENANT


@pytest.mark.parametrize(
    "header", [None, b"", b"two", b"Basic two", b"Bearer", b"Bearer tw", b"Bearer twoo", b"Bearer \xff"]
)
def test_everything_else_is_refused(header):
    with pytest.raises(ApiError) as error:
        Tenants(b"", ["one", "two"]).identify(header)
    assert (error.value.status, error.value.detail.code) == (401, "invalid_api_key")
    assert ("www-authenticate", "Bearer") in error.value.headers


def test_salts_differ_by_secret_and_tenant_and_are_stable():
    salts = {Tenants(secret).salt(tenant) for secret in (b"a", b"b") for tenant in ("x", "y")}
    assert len(salts) == 4
    assert Tenants(b"a").salt("x") == Tenants(b"a").salt("x")
    assert {len(salt) for salt in salts} == {32}
