"""What the heart asks of a host (`port.py`), and the two hosts that answer."""
