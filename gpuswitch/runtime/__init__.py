"""Small helpers of the process: threads, waiting, systemd's notify socket, addresses of buses."""
