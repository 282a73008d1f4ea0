"""Layers of settings: files and variables, one over the other, with a note of which layer set which key.

Tables merge key by key, everything else is replaced whole. `[[gpu]]` tables of different layers are one where their
address is the same, or where they have none and match the same. What the keys mean, and which exist, `schema.py` says.
"""

from __future__ import annotations

import ast
import json
import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpuswitch.config.places import Fault, Location, Places
from gpuswitch.config.schema import match_of
from gpuswitch.config.shown import shown
from gpuswitch.errors import ConfigError, InvalidArgument
from gpuswitch.model.address import PciAddress
from gpuswitch.sentence import Sentence

TOO_DEEP = Sentence("it is nested too deeply")
NO_TABLES = Sentence("write [[gpu]] with two brackets on each side: there is such a table for each GPU")
_PLACE = re.compile(r"(?P<what>.*) \(at line (?P<line>\d+), column (?P<column>\d+)\)", re.DOTALL)
"""How tomllib ends a sentence."""
_QUOTES = Sentence("text stands in double quotes, numbers, true and false without any")
_OPEN = Sentence("a quote that begins here does not end: is there a quote missing?")
_HEADING = Sentence("a heading ends with as many ] as it has [ before it")
_LIST = Sentence("a list does not end: is there a quote, a comma or ] missing before this?")
_HINTS = {
    "Invalid value": _QUOTES,
    "Expected newline or end of document after a statement": _QUOTES,
    "Cannot overwrite a value": Sentence("this key is there twice"),
    "Illegal character '\\n'": _OPEN,
    "Unterminated string": _OPEN,
    'Expected "\'"': _OPEN,
    "Expected ']]' at the end of an array declaration": _HEADING,
    "Expected ']' at the end of a table declaration": _HEADING,
    "Unclosed array": _LIST,
    "Expected '=' after a key in a key/value pair": Sentence("write key = value"),
    "Cannot declare": Sentence("what belongs to this table goes where it stands first"),
}
"""What most likely led to a sentence of tomllib's."""
_CURLED = re.compile("=.*[\u2018-\u201f\u00ab\u00bb]")
_CURLY = Sentence("these are typographic quotes: write straight ones")
_ASIDE = re.compile(
    r"(\..*|README.*|.*(~|\.(bak|md|new|off|old|orig|save|disabled|example|sample|(rpm|dpkg-|ucf-)\w+)))", re.DOTALL
)
"""What is called so was put aside, by an editor, a packet manager or a person, and nobody expects it to be read."""
_MEANT = re.compile(r"(conf|gpuswitch).*|.*\.(toml|conf|cfg|ini|ya?ml|json|d)", re.DOTALL)
"""What is called so beside the configuration may be meant for it. A service of somebody's own has other files there."""
_KEY_AS_TUPLE = re.compile(r"(Cannot declare|Cannot redefine namespace|Cannot mutate immutable namespace) (\(.*\))(.*)")
"""Sentences of tomllib's that have a key as Python writes it: `Cannot declare ('defaults',) twice`."""
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


class Layers:
    """What the layers added so far say together. `faults` has one for each that could not be read.

    `warnings` has one for each file that is never read, though it lies where one is. `instead` has the files that are
    read from somewhere else. `trusting`: it is no matter who else may write them.
    """

    def __init__(self, instead: Mapping[Path, Path], *, trusting: bool) -> None:
        self.values: dict[str, Any] = {}
        self.faults: list[Fault] = []
        self.warnings: list[str] = []
        self.files: list[Path] = []
        """Those that were read."""
        self._instead = instead
        self._trusting = trusting
        self._origins: dict[Location, str] = {}
        self._places: dict[str, Places] = {}
        """What stands in each file."""
        self._own_places: dict[tuple[str, int], int] = {}
        """Which of its `[[gpu]]` tables a layer has for the one in that place of all."""

    def add_directory(self, path: Path) -> None:
        """Add `config.toml`, then `conf.d/*.toml` by name. What is not there says nothing."""
        for file in self._files(path):
            self.add_file(file)

    def add_file(self, file: Path) -> None:
        """Add one file. One that is not there says nothing."""
        try:
            content, status = _read(self._instead.get(file, file), file)
            if distrust := self._distrust(file, status):
                self.faults.append(Fault(distrust))
                return
        except FileNotFoundError:
            return
        except ConfigError as error:
            self.faults.append(Fault(str(error)))
            return
        except OSError as error:
            self.faults.append(Fault(Sentence("cannot read {file}: {why}", file=file, why=error.strerror)))
            return
        try:
            text = content.decode()
            self._places[str(file)] = Places(text)
            self.add(str(file), tomllib.loads(text))
            self.files.append(file)
        except ValueError as error:  # not TOML, or not even UTF-8
            self.faults.append(_unreadable(str(file), content, error))
        except RecursionError:
            self.faults.append(Fault.within(str(file), TOO_DEEP))

    def add(self, origin: str, values: Mapping[str, Any]) -> None:
        """Put one layer over the others; `origin` names it to a person."""
        tables = dict(values)
        gpus = tables.get("gpu")
        if isinstance(gpus, dict):  # [gpu], which a later layer would replace whole
            self.faults.append(self._fault(origin, ("gpu",), "gpu", NO_TABLES))
        elif isinstance(gpus, list) and isinstance(self.values.setdefault("gpu", []), list):
            self._add_gpus(origin, tables.pop("gpu"))
        self._overlay(self.values, tables, (), origin)

    def origin(self, location: Location) -> str | None:
        """The layer that set this key; None where none did."""
        return self._origins.get(location)

    def fault(self, location: Location, what: str) -> Fault:
        """What is wrong there: told of the layer that set this key, else the innermost table around it."""
        nearest = location
        while nearest and nearest not in self._origins:
            nearest = nearest[:-1]
        origin = self._origins.get(nearest, "the configuration")
        match location:
            case ("gpu", int(place), *rest):
                own: Location = ("gpu", self._own_places.get((origin, place), place), *rest)
            case _:
                own = location
        return self._fault(origin, own, self.key(location), what)

    def in_order(self, fault: Fault) -> tuple[int, int]:
        """How people read them: by the layers, and from above."""
        names = list(self._places)
        return (names.index(fault.file) if fault.file in names else len(names), fault.line)

    def _fault(self, origin: str, own: Location, key: str, what: str) -> Fault:
        """In one layer, at the place that a key has within it."""
        if (places := self._places.get(origin)) is None:
            return Fault.of(origin, what, key=key)
        return Fault.within(origin, what, line=places.line_of(own), key=key)

    def key(self, location: Location) -> str:
        """`gpu[0000:01:00.0].members[2]`: a GPU's table by its address, everything else by its place, from 1."""
        text = ""
        for depth, part in enumerate(location):
            if isinstance(part, str):
                name = _as_key(part)
                text += f".{name}" if text else name
            else:
                own = _label(self.values["gpu"][part]) if depth == 1 and location[0] == "gpu" else None
                text += f"[{own or part + 1}]"
        return text

    def _files(self, path: Path) -> Iterator[Path]:
        """The files to read, in order. Hidden ones are an editor's, not the administrator's."""
        yield path / "config.toml"
        drop_ins = path / "conf.d"
        names = {file.name for file in self._instead if file.parent == drop_ins}
        for directory in (path, drop_ins):
            try:
                entries = sorted(directory.iterdir())
                self.faults += [Fault(text) for text in [self._distrust(directory, directory.stat())] if text]
            except FileNotFoundError:
                break
            except OSError as error:
                self.faults.append(Fault(Sentence("cannot read {file}: {why}", file=directory, why=error.strerror)))
                break
            if directory == drop_ins:
                names.update(entry.name for entry in entries)
                self.warnings.extend(_unread(entry, path) for entry in entries if not _is_drop_in(entry.name))
            else:
                others = (entry for entry in entries if _looks_meant(entry.name))
                self.warnings.extend(_unread(entry, path) for entry in others)
        self.warnings[:] = filter(None, self.warnings)
        yield from (drop_ins / name for name in sorted(names) if _is_drop_in(name))

    def _distrust(self, path: Path, status: os.stat_result) -> str:
        """Why a service that runs as root must not take orders from this file or directory; "": it may."""
        if self._trusting or (status.st_uid == 0 and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
            return ""
        return Sentence(
            "cannot trust {path}: others than root may write it; run: {command}",
            path=path,
            command=f"chown root {path} && chmod go-w {path}",
        )

    def _add_gpus(self, origin: str, gpus: Sequence[Any]) -> None:
        present: list[Any] = self.values["gpu"]
        self._origins[("gpu",)] = origin
        before = [_label(gpu) for gpu in present]
        named: dict[str, int] = {}
        for own_place, gpu in enumerate(gpus):
            label = _label(gpu)
            if label in named:
                self.faults.append(self._two_tables(origin, gpus, named[label], own_place))
            elif label is not None and label in before:
                index = before.index(label)
                self._own_places[(origin, index)] = own_place
                self._overlay(present[index], gpu, ("gpu", index), origin)
            else:
                present.append(None)
                self._own_places[(origin, len(present) - 1)] = own_place
                self._overlay(present, {len(present) - 1: gpu}, ("gpu",), origin)
            if label is not None:
                named.setdefault(label, own_place)

    def _two_tables(self, origin: str, gpus: Sequence[Any], first: int, second: int) -> Fault:
        """Of one GPU, in one layer."""
        line = self._places[origin].line_of(("gpu", first)) if origin in self._places else 0
        if not gpus[second].get("address"):
            what = Sentence("this match has two tables")
        else:
            what = Sentence("this address has two tables")
        if line:
            what = Sentence("{what}, the first of them in line {line}: make one of both", what=what, line=line)
        return self._fault(origin, ("gpu", second), f"gpu[{_label(gpus[second])}]", what)

    def _overlay(self, target: Any, values: Mapping[Any, Any], location: Location, origin: str) -> None:
        """Put `values` over a table, or over the items of a list by their index."""
        for key, value in values.items():
            here = (*location, key)
            self._origins[here] = origin
            if not isinstance(value, dict):
                target[key] = value
                continue
            if isinstance(target, list) or not isinstance(target.get(key), dict):
                target[key] = {}
            self._overlay(target[key], value, here, origin)


def _read(place: Path, file: Path) -> tuple[bytes, os.stat_result]:
    """Read the regular file that lies there, and is `file` to a person. It is opened without waiting, since opening a
    pipe waits for its writer.

    Raises:
        ConfigError: it is no regular file.

    """
    descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(Sentence("cannot read {file}: it is not a regular file", file=file))
        return stream.read(), status


def _is_drop_in(name: str) -> bool:
    return name.endswith(".toml") and not name.startswith(".")


def _looks_meant(name: str) -> bool:
    """Whether it may be meant for the configuration, as it is called."""
    return name not in {"config.toml", "conf.d"} and _MEANT.fullmatch(name) is not None


def _unread(entry: Path, path: Path) -> str:
    """That nobody reads this file, or the files in this directory; "" where nobody expects it."""
    try:
        if _ASIDE.fullmatch(entry.name) or (entry.is_dir() and not any(entry.glob("*.toml"))):
            return ""
    except OSError:  # what it is cannot be seen, and that nobody reads it is true of all
        pass
    return Sentence(
        "{file} is not read: the configuration is {main} and {others}",
        file=entry,
        main=path / "config.toml",
        others=path / "conf.d/*.toml",
    )


def _label(gpu: object) -> str | None:
    """What a `[[gpu]]` table is known by, in its one spelling: its address, else what it matches.

    An address as it is written where it is none; None where nothing can be told.
    """
    if not isinstance(gpu, dict):
        return None
    if written := gpu.get("address"):
        try:
            return str(PciAddress.parse(str(written)))
        except (InvalidArgument, ValueError):
            return shown(written)
    try:
        return str(match_of(gpu.get("match", {}))) or None
    except ValueError:
        return None


def _as_key(name: str) -> str:
    """As it is written in TOML."""
    return name if _BARE_KEY.fullmatch(name) else json.dumps(name)


def _unreadable(file: str, content: bytes, error: ValueError) -> Fault:
    """Why these bytes are no TOML, with the line where it begins, and what stands there."""
    if isinstance(error, UnicodeDecodeError):
        number = content.count(b"\n", 0, error.start) + 1
        return Fault.within(file, Sentence("it is not UTF-8, the encoding of TOML: save the file as that"), line=number)
    place = _PLACE.fullmatch(str(error))
    text = content.decode()
    lines = text.splitlines()
    if place is None:  # its end, which has no line
        what, column = str(error).removesuffix(" (at end of document)"), 0
        number = Places(text).first_unread() or text.rstrip().count("\n") + 1
    else:
        what, number, column = place["what"], int(place["line"]), int(place["column"])
    line = lines[number - 1].strip() if number <= len(lines) else ""
    key = _KEY_AS_TUPLE.fullmatch(what)
    hint = _CURLY if _CURLED.search(line) else _HINTS.get(key[1] if key else what)
    if key:
        what = f"{key[1]} {'.'.join(map(_as_key, ast.literal_eval(key[2])))}{key[3]}"
    said = Sentence("it is not TOML: {what}: {line}", what=what, line=shown(line))
    if hint:
        said = Sentence("it is not TOML: {what}: {line}; {hint}", what=what, line=shown(line), hint=hint)
    return Fault.within(file, said, line=number, column=column)
