"""Debian systems for the tests: made of packages, the project installed in them as a user would, and kept.

tests/real_system boots them as containers, tests/real_kernel in an emulated PC. All of it lies in
~/.cache/gpuswitch-tests, or where GPUSWITCH_TEST_CACHE says. Remove it to get Debian's newest.
"""
