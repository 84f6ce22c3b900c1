import asyncio

import uvloop


def pytest_asyncio_loop_factories(config, item):
    """Every channel test runs on both loops: our processes run on uvloop, a Ray Serve replica may not."""
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
