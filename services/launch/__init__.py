"""Everything on one machine: what `make run` starts, in which order, and how all of it stops again.

`python -m services.launch` checks what it can before it starts anything, then supervises Redis, the cache
store's upkeep, a private Ray with the workers on it (`ray_host`), and the router, each a process of its own.
`demo_model` fetches the model that `make run` serves when it is given none.
"""
