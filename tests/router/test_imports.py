"""What the router must be able to do without."""

import subprocess
import sys

import pytest


def imported_by(module):
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return set(done.stdout.split())


def test_the_router_needs_no_torch_ray_or_kubernetes():
    assert not imported_by("services.router.__main__") & {"torch", "ray", "kubernetes", "numpy"}


@pytest.mark.parametrize("module", ["index", "load", "rates", "routing", "admission", "retry"])
def test_the_routing_core_needs_no_clock_and_no_network(module):
    assert not imported_by(f"services.router.{module}") & {"asyncio", "socket", "uvicorn"}
