"""What takes bytes from others, and inputs for it.

`targets.py` has a function for each reader; `corpus/NAME/` what that is to read: some of it well-formed, some made by
hand to be odd, some found. `python -m tests.fuzz` looks for more with atheris; `tests/unit/test_fuzz_corpus.py` reads
all that is there in each run of the tests.
"""
