"""The long campaign, before a release: `make kubernetes`."""

from __future__ import annotations

import argparse
import logging
import sys

from tests.harness.kubernetes.campaign import Violation, campaign


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.harness.kubernetes", description=__doc__)
    parser.add_argument("--faults", type=int, default=5000, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first world (default: %(default)s)")
    options = parser.parse_args()
    logging.disable()  # what the agent says of so many faults
    try:
        for seed, done in campaign(options.faults, options.seed):
            sys.stdout.write(f"\r{done} faults, seed {seed}")
            sys.stdout.flush()
    except Violation as error:
        sys.stdout.write(f"\n{error}\n")
        return 1
    sys.stdout.write("\nno violation\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
