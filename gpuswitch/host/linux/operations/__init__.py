"""The operations of the worker. Its start-up is part of the first switch, so they import next to nothing.

`re` alone would double the time, so addresses and names are checked by hand. They are checked although the daemon did
so: this is what writes. Which attribute is written, and what to it, is declared in `gpuswitch/host/port.py` alone, and
the daemon's side of the socket holds to it. Each public method of a class here is one operation, by the name that
`Kernel` declares it by, or `write`; it takes its arguments as text, and returns its values as text (`../wire.py`).
"""
