"""Finding workers: a static list, Kubernetes EndpointSlices, or Ray Serve replicas.

A fleet says which addresses exist. Identity, readiness, load, cache events and draining come in-band on the
token channel, so that every kind of fleet behaves alike.
"""

from services.fleet.base import Address, Fleet, OnChange
from services.fleet.static import StaticFleet

__all__ = ["Address", "Fleet", "OnChange", "StaticFleet"]
