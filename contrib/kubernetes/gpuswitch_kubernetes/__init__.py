"""The agent of a Kubernetes node: GPUs go where the annotations of the node want them, by way of gpuswitchd.

`decide.py` is the heart, and pure. What it goes by is read by `gpus.py`, `desires.py`, `owners.py` and `users.py`,
which are pure, too. Effects stand in `cluster.py` (the API server) and `service.py` (gpuswitchctl); `agent.py` puts
it together.
"""
