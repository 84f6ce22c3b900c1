"""The engine: continuous batching over paged KV, its channel server, its Ray Serve deployment.

`request` is what goes in and comes out. The pure core: `policy` and `pages` keep the books of KV memory,
`scheduler` decides a step (`plan`), `commit` says what its tokens mean. The device: `runner` turns a plan
into `rows` and a `batch` over `tables` and executes it with a decoder of `models` on the memory of `kv`,
kernel by kernel or as one of the `graphs`; `memory` says how much there is. `engine` ties them into plan ->
launch -> commit on one thread, `inbox` is its door, `store_traffic` moves blocks beside it. `server` speaks
the token channel, `process` is a whole worker, `deployment` the same as a Ray Serve replica.
"""
