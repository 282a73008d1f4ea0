"""`config check`: what is wrong with a configuration, without the service and before it reads it.

gpuswitchd itself looks (`--check-config`), as a program that ends at once: so the command sees what the service would
see, and knows nothing of how it reads.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from gpuswitch.cli.failures import CtlError
from gpuswitch.cli.output import as_json, line, place, problem, warning
from gpuswitch.cli.simulated import Serving, serving
from gpuswitch.cli.translate import _, recognized, reworded
from gpuswitch.errors import ConfigError, Failed

DIRECTORY = Path("/etc/gpuswitch")


class Verdict:
    """What gpuswitchd says of a configuration: what it knows of each fault, a sentence for what has no effect, and,
    where there is no fault, the settings in force, as the service's Config() has them, and the files that say so.
    """

    def __init__(
        self,
        faults: Sequence[Mapping[str, Any]],
        warnings: Sequence[str],
        settings: Sequence[Mapping[str, Any]] = (),
        files: Sequence[str] = (),
    ) -> None:
        self.faults = faults
        self.warnings = warnings
        self.settings = settings
        self.files = files

    def tell(self) -> None:
        """Say all of it on standard error."""
        for sentence in self.warnings:
            warning(recognized(sentence))
        for fault in self.faults:
            if fault["file"]:
                # As compilers say it: editors and terminals go to what is written so.
                place(":".join(str(fault[each]) for each in ("file", "line", "column") if fault[each]), _words(fault))
            else:
                problem(whole(fault))


def _words(fault: Mapping[str, Any]) -> str:
    return ": ".join(filter(None, (fault["key"], in_their_words(fault))))


def in_their_words(fault: Mapping[str, Any]) -> str:
    """What is wrong there, the end of a sentence, in the language of whoever reads it."""
    return reworded(fault["what"], [{"text": fault["what"], **fault["words"]}])


def whole(fault: Mapping[str, Any]) -> str:
    """The whole sentence, in the language of whoever reads it."""
    return recognized(fault["text"].replace(fault["what"], in_their_words(fault)) if fault["what"] else fault["text"])


def _fault_record(fault: Mapping[str, Any]) -> dict[str, Any]:
    """docs/json.md has the form."""
    return {
        "text": fault["text"],
        "file": fault["file"],
        "line": fault["line"] or None,
        "column": fault["column"] or None,
        "key": fault["key"],
        "what": fault["what"],
    }


def check(args: Namespace) -> int:
    """Check a file alone, or a directory as a whole."""
    found = Serving("", "") if args.path else serving(args.bus)
    path = Path(args.path or found.directory or DIRECTORY)
    verdict = judged(path, machine=found.machine)
    if args.json:
        faults, places = [fault["text"] for fault in verdict.faults], list(map(_fault_record, verdict.faults))
        told = {"faults": faults, "places": places, "warnings": verdict.warnings}
        as_json({"path": str(path), **told, "files": verdict.files})
    else:
        verdict.tell()
        if not verdict.faults:
            line(_usable(path, verdict.files))
    return ConfigError.exit_code if verdict.faults else 0


def _usable(path: Path, files: Sequence[str]) -> str:
    """That it can be used, and what there is of it."""
    if not files:
        return _("there is no configuration in {path}: everything is as by default", path=path)
    if list(files) == [str(path)]:
        return _("the configuration in {path} can be used", path=path)
    return _("the configuration in {path} can be used: {files}", path=path, files=", ".join(files))


def refused_on_disk(about: Mapping[str, Any]) -> list[str]:
    """That the service would refuse what lies in its directory now, a sentence; none where it would not, or nobody can
    tell. `about` is what it says of itself: it goes on with what it has read before, and says that.
    """
    folder = about.get("ConfigDirectory")  # one that is older does not say
    try:
        verdict = judged(Path(folder), machine=about.get("Simulated", "")) if folder else Verdict((), ())
    except CtlError:
        return []
    # What a user may not read the service can.
    if not any(fault["file"] or os.geteuid() == 0 for fault in verdict.faults):
        return []
    text = _(
        "the configuration in {folder} cannot be used as it is now, so this is what the service has read before: "
        "{command} names what is wrong",
        folder=folder,
        command=f"gpuswitchctl config check {quote(str(folder))}",
    )
    return [text]


def judged(path: Path, *, file: Path | None = None, copy: Path | None = None, machine: str = "") -> Verdict:
    """What gpuswitchd says of what lies there; of `copy` instead of `file`, where one is given. `machine` is one in
    memory, whose GPUs it is about.

    Raises:
        CtlError: it says nothing.
    """
    import json  # noqa: PLC0415 -- with subprocess half of the start, and for few
    import subprocess  # noqa: PLC0415 -- as above

    from gpuswitch.cli.programs import installed  # noqa: PLC0415 -- by need, as above

    command = [installed("gpuswitchd"), f"--check-config={path}", "--json"]
    if machine:
        command += ["--simulate", machine]
    if file and copy:
        command += ["--instead", str(file), str(copy)]
    # The service's own variables count for it alone. Ours are our caller's.
    environ = {key: value for key, value in os.environ.items() if not key.upper().startswith("GPUSWITCH_")}
    try:
        ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    except OSError as error:
        why = _("cannot start {program}: {why}", program=command[0], why=error.strerror)
        raise CtlError.of(Failed, _("cannot check {path}: {why}", path=path, why=why)) from error
    try:
        found = json.loads(ended.stdout)
    except ValueError:
        said = ended.stderr.strip().rpartition("\n")[2] or _("it ended with status {status}", status=ended.returncode)
        text = _("cannot check {path}: {why}", path=path, why=said.removeprefix("gpuswitchd: "))
        raise CtlError.of(Failed, text) from None
    return Verdict(found["faults"], found["warnings"], found["settings"], found["files"])
