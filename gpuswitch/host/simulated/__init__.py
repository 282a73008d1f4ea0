"""A small kernel in memory: the same port as the real host, the same errno for the same mistake, no hardware.

It waits through the running loop's clock only, so a loop with a virtual clock runs it as fast as Python goes, and the
same calls give the same results each time.
"""
