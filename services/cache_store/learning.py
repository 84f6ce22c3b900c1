"""From what the Redis Functions have counted to the weights they evict by.

Whoever calls `learn` first does it for all: events are folded once, whatever crashes or overlaps.
"""

from __future__ import annotations

from services.cache_store.functions import Learning, StoreFunctions
from services.cache_store.worth import History


def learn(functions: StoreFunctions, learning: Learning) -> bool:
    """Fold what has happened, `functions.events()`, into new weights. False if somebody else was faster.
    Raises what redis-py raises."""
    history = History.from_bytes(learning.history)
    weights = history.fold(learning.events())
    return functions.learn(learning, history.to_bytes(), weights.to_bytes())
