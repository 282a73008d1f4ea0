"""The real service on machines in memory, under a clock that jumps, with everything that can go wrong.

`python -m tests.harness.simulation` (or `make simulate`) plays stories and tries every step; `--seed`, `--story` and
`--trial` play one again, event for event. From the outside in:

- `story` makes what happens from a seed, `drive` makes it happen; `exhaustive` goes through every step instead.
- `world` is a machine, the service that lives on it, and whoever asks it; `virtual_machines` are those that it runs.
- `loop` has the clock, and ends a service as SIGKILL does; `doubles` are all that the service sees of the world;
  `trouble` lets operations fail, wait and hang.
- `invariants`, `checker`, `actions`, `promises` and `rest_checks` check what must always be so; `mutations` break it,
  so that we know they do.
- `play` runs one, `process_pool` many, `shrink` makes a story short.
"""
