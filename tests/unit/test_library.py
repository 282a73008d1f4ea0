"""Which D-Bus library is used, and what both give."""

import sys
from pathlib import Path

import pytest

from gpuswitch.api.library import LIBRARIES, chosen, library


@pytest.mark.parametrize("environ", [{}, {"DBUS_LIBRARY": ""}, {"DBUS_LIBRARY": "dbus-next"}])
def test_it_is_dbus_next(environ: dict[str, str]) -> None:
    assert chosen(environ) == "dbus-next"


def test_it_may_be_dbus_fast() -> None:
    assert chosen({"DBUS_LIBRARY": "dbus-fast"}) == "dbus-fast"


def test_an_unknown_one_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"^cannot use DBUS_LIBRARY=libdbus: it is one of dbus-next, dbus-fast$"):
        chosen({"DBUS_LIBRARY": "libdbus"})


def test_the_chosen_one_is_used_and_no_other() -> None:
    loaded = [name for name in LIBRARIES if name.replace("-", "_") in sys.modules]
    assert loaded == [chosen()]


def test_what_reads_for_it_is_python() -> None:
    """What is compiled may end the process where Python raises: at bytes that are no message."""
    package = chosen().replace("-", "_")
    files = [str(module.__file__) for name, module in sys.modules.items() if name.startswith(f"{package}.")]
    assert {Path(file).suffix for file in files} == {".py"}


@pytest.mark.parametrize(
    ("signature", "body"),
    [
        ("s", []),
        ("s", ["a", "b"]),
        ("s", [1]),
        ("b", [1]),
        ("u", [-1]),
        ("o", ["no path"]),
        ("(ss)", [["a"]]),
        ("as", ["abc"]),
        ("v", ["a"]),
    ],
)
def test_a_body_that_does_not_fit_is_not_sent(signature: str, body: list[object]) -> None:
    with pytest.raises(ValueError, match=r"body|DBus"):
        library.marshal_body(signature, body)
    with pytest.raises(ValueError, match=r"body|DBus"):
        library.marshal(library.Message(path="/", member="Tell", signature=signature, body=body))


def test_a_body_that_fits_is_laid_out_as_the_specification_has_it() -> None:
    """Strings have their length before them and a zero behind them; a struct begins on a multiple of eight."""
    content = library.marshal_body("y(su)", [7, ["ab", 5]])
    assert content == b"\7" + bytes(7) + b"\2\0\0\0ab\0\0" + b"\5\0\0\0"
