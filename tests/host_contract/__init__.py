"""What every host does: one suite for the simulated one, in memory, and for the real one, on a real kernel.

Standard library and gpuswitch only, so that it runs in a machine that has no more than these.
"""
