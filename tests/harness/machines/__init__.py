"""Machines that tests run commands in: emulated PCs (virtual_machines) and containers (containers).

What both have in common: a channel to a program inside (inside/agent.py) that runs shell commands as root, and what a
test sees of that. It needs neither a network nor a login, and works from early boot until the end of a shutdown.
"""
