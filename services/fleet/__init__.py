"""Finding workers: a static list, or Ray Serve replicas (`ray_serve`; not imported here, it needs ray).

A fleet says which addresses exist. Identity, readiness, load, cache events and draining come in-band on the
token channel, so that every kind of fleet behaves alike.
"""

from services.fleet.base import Address, Fleet, OnChange
from services.fleet.static import StaticFleet

__all__ = ["Address", "Fleet", "OnChange", "StaticFleet"]
