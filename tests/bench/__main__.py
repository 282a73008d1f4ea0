"""`python -m tests.bench`: prints speed and size, beside their targets or beside another revision's.

Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tests.bench import attacked, command, emulated, here, holders, hook, many, profile, readers
from tests.bench.builds import Build, build_tree, checked_out, find_commit, open_cache
from tests.bench.table import show, write_shown
from tests.harness.debian.errors import HarnessError
from tests.harness.debian.tools import PROJECT


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Speed and size, printed.")
    parser.add_argument("--vm", action="store_true", help="also switches on a real kernel in the virtual machine")
    parser.add_argument("--base", metavar="REV", help="measure beside this revision, by turns, and print ratios")
    parser.add_argument("--profile", action="store_true", help="where the time of one switch goes, and nothing else")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables there, too")
    options = parser.parse_args()
    try:
        if options.profile:
            tell_profile()
        elif options.base is None:
            measure(vm=options.vm)
        else:
            compare(options.base, vm=options.vm)
    except HarnessError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        if options.json is not None:
            write_shown(options.json)
    return 0


def tell_profile() -> None:
    for method in here.SWITCHES:
        show(f"{method} in memory, step by step ({machine()})", ("before it", "itself"), profile.rows(method))


def measure(*, vm: bool) -> None:
    head = ("measured", "target")
    show(f"The service on this machine ({machine()})", head, here.measure())
    show("The commands, from start to exit", head, command.measure())
    show("Readers during a switch", head, readers.measure())
    show("Many GPUs", head, many.measure())
    show(f"Who has a node open, among processes with {holders.DESCRIPTORS} descriptors each", head, holders.measure())
    show("The libvirt hook", head, hook.measure())
    for name, program in attacked.buses():
        show(
            f"Under attack by {attacked.CONNECTIONS} connections on {name} ({machine()})",
            head,
            attacked.measure(program),
        )
    if vm:
        show("Switching two functions in the virtual machine", head, emulated.measure())


def compare(revision: str, *, vm: bool) -> None:
    """Only what can be seen from outside: commands, the bus, the unit. Raises HarnessError where it cannot be built."""
    commit = find_commit(revision)
    cache = open_cache()
    with checked_out(commit) as tree:
        base = build_tree(cache, commit, tree)
    this = build_tree(cache, "this", PROJECT)
    head = (this.name, base.name, f"{this.name} / {base.name}, the median of the pairs (and their middle half)")
    tell_libraries(this, base)
    show(f"The service on this machine ({machine()})", head, here.compare(this, base))
    show("The commands, from start to exit", head, command.compare(this, base))
    if hook.gate(base).exists():
        show("The libvirt hook", head, hook.compare(this, base))
    else:
        print(f"\nThe libvirt hook: {base.name} has none")
    for name, program in attacked.buses():
        title = f"Under attack by {attacked.CONNECTIONS} connections on {name} ({machine()})"
        show(title, head, attacked.compare(program, this, base))
    if vm:
        show("The service in the virtual machine, and two functions", head, emulated.compare(this, base))


def machine() -> str:
    return f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}"


def tell_libraries(*builds: Build) -> None:
    """Where others were installed with one build than with the other, they are a part of what is compared."""
    common = set.intersection(*(build.libraries() for build in builds))
    for build in builds:
        if own := sorted(build.libraries() - common):
            print(f"Only {build.name} is installed with {', '.join(own)}")


sys.exit(main())
