"""The services of Reprise: wire (shared), worker, router, cache_store, fleet."""
