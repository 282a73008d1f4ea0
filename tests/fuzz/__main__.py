"""`python -m tests.fuzz [TARGET]`: looks for bytes that a target does not take, led by what they reach in the code.

Without a target, all have their turn. What is found is put beside what the target is to read, so that the tests fail
until it is mended; what only reaches further is kept in `.cache/fuzz`, and gone on from the next time.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fuzz.targets import MEMORY

CORPUS = Path(__file__).with_name("corpus")
CACHE = Path(__file__).parents[2] / ".cache/fuzz"
LONGEST = 4096
"""Bytes of an input."""
PATIENCE = 10
"""Seconds that one input may take."""
MEGABYTES = 1024


def main() -> int:
    """0: nothing was found; 1: something was."""
    names = sorted(folder.name for folder in CORPUS.iterdir())
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("target", nargs="?", choices=names, help="this one only")
    parser.add_argument("--seconds", type=int, default=60, metavar="N", help="for each target (default: %(default)s)")
    options = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        sys.exit(f"atheris is missing; install it: {sys.executable} -m pip install atheris")
    found = [path for name in names if options.target in {name, None} for path in look(name, options.seconds)]
    for path in found:
        print(f"found: {path}")
    return 1 if found else 0


def look(name: str, seconds: int) -> list[Path]:
    """Run one target in a process of its own, for libFuzzer ends the one that it is in; what it found."""
    print(f"--- {name}", flush=True)
    seeds, reached = CORPUS / name, CACHE / name
    reached.mkdir(parents=True, exist_ok=True)
    before = {*seeds.iterdir()}
    limits = (f"-max_total_time={seconds}", f"-max_len={LONGEST}", f"-timeout={PATIENCE}", f"-rss_limit_mb={MEGABYTES}")
    command = [sys.executable, "-m", "tests.fuzz.inside", name, *limits, "-verbosity=0", "-print_final_stats=1"]
    with TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        words = Path(folder, "words")
        words.write_text("".join(f'"{word}"\n' for word in sorted(words_in(seeds))))
        ended = subprocess.run(
            [*command, f"-dict={words}", f"-artifact_prefix={seeds}/", str(reached), str(seeds)],
            env={**os.environ, "TMPDIR": folder},
            check=False,
        )
    found = sorted({*seeds.iterdir()} - before)
    if ended.returncode and not found:
        sys.exit(f"{name} ended with status {ended.returncode}, and left nothing that it found")
    return found


def words_in(seeds: Path) -> set[str]:
    """To be put together anew: what is read in C, as XML is, does not show how far it was read."""
    return {word.decode() for seed in seeds.iterdir() for word in re.findall(rb"[\w.:/-]{2,40}", seed.read_bytes())}


if __name__ == "__main__":
    sys.exit(main())
