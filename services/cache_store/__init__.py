"""The shared KV block store on Redis: blocks that any worker computed, for every worker to load.

`functions` (with functions.lua) keeps the metadata and evicts what is worth least: `worth` says how that is
learned, `learning` does it, `eviction` is the policy without a server. `frames` are the payloads' format,
`payloads` moves them over a `pool` of `connection`s as `lanes` allow, `allocation` fits them into Redis'
memory, `client` puts these together for workers, `shards` chooses among several servers, `service` is the
upkeep with its `metrics`, `deletion` and `tenants_file`, `operators` and `operators_http` are what operators
may ask, `recorder` writes traces, `embedded` finds or starts a Redis. The worker's side of it is
`services.worker.store_tier`.
"""
