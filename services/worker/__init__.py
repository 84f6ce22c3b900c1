"""The engine: continuous batching over paged KV, its channel server, its Ray Serve deployment.

`request` is what goes in and comes out, `scheduler` and `pages` are the pure core, `runner` executes a step
on the device, `engine` ties them into plan -> launch -> commit, `server` speaks the token channel,
`deployment` is the same server as a Ray Serve replica.
"""
