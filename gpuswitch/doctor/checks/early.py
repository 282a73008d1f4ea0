"""Of what `gpuswitchctl setup boot` has the initrd do."""

from __future__ import annotations

from collections.abc import Iterator

from gpuswitch.doctor import remedies
from gpuswitch.doctor.findings import Said, ok, warning
from gpuswitch.doctor.seen import Seen
from gpuswitch.sentence import Sentence

OFF = "gpuswitch.early=off"
"""The word on the kernel's command line with which the initrd binds nothing."""
AGAIN, UNDO = "gpuswitchctl setup boot", "gpuswitchctl setup boot undo"


def early(seen: Seen) -> Iterator[Said]:
    """Nothing is said where nothing was written."""
    found = seen.early
    changed = [each for each in found.functions if each.found != each.ids]
    for each in changed:
        yield warning(
            Sentence(
                "the initrd leaves {function} to its host driver: there was {before}, and now there is {now}",
                function=each.place,
                before=each.ids,
                now=each.found or Sentence("nothing"),
            ),
            Sentence("set it up anew, or take it back"),
            (AGAIN, UNDO),
        )
    if found.pending:
        yield warning(
            Sentence("the initrd was to be made anew, and that did not end: nobody knows what it binds"),
            Sentence("set it up anew, or take it back"),
            (AGAIN, UNDO),
        )
    elif found.script and found.initrd and found.made < found.written:
        yield warning(
            Sentence(
                "{initrd} is older than {script}: what that binds is not in force",
                initrd=found.initrd,
                script=found.script,
            ),
            Sentence("make it anew"),
            remedies.rebuild_initramfs(seen.system),
        )
    elif found.script and OFF in seen.system.command_line:
        yield warning(
            Sentence("the initrd binds nothing: the kernel command line has {option}", option=OFF),
            Sentence("take it off the kernel command line"),
            remedies.remove_option(seen.system, OFF),
        )
    elif found.script and not changed:
        yield ok(
            Sentence(
                "the initrd gives {functions} to vfio-pci, before any host driver",
                functions=", ".join(each.address for each in found.functions),
            )
        )
