"""The D-Bus library's defects that show without a bus."""

import gc
import subprocess
import sys
from itertools import product

import jeepney
import pytest

from gpuswitch.api.connection import Message, SignatureTree, crowded_error, message_size

PING = jeepney.new_method_call(jeepney.DBusAddress("/", "org.example1", "org.freedesktop.DBus.Peer"), "Ping")


def test_the_library_can_be_imported_where_typing_has_lost_what_it_asks_for() -> None:
    """As in Python 3.15."""
    program = "import typing; vars(typing).pop('no_type_check_decorator', None); import gpuswitch.api.connection"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_what_is_remembered_of_signatures_has_a_limit() -> None:
    for types in product("ybnqiuxtds", repeat=4):
        Message(path="/", member="Tell", signature="".join(types), body=[])
    assert 0 < sum(isinstance(each, SignatureTree) for each in gc.get_objects()) < 5000


def test_the_size_of_a_message_shows_in_its_first_bytes() -> None:
    message = PING.serialise(1)
    assert message_size(message[:15]) is None
    assert message_size(message[:16]) == len(message)
    assert message_size(message + b"next") == len(message)


def test_what_is_no_message_has_no_size() -> None:
    with pytest.raises(ValueError, match="the bus sent something that is not D-Bus"):
        message_size(b"HTTP/1.1 400 Bad Request")


@pytest.mark.parametrize("destination", [":1.4", ":1.42", ":1.4294967295"])
def test_the_answer_that_is_laid_out_by_hand_is_a_message(destination: str) -> None:
    parser = jeepney.low_level.Parser()
    parser.add_data(crowded_error(destination, 7, 9))
    error = parser.get_next_message()
    assert (error.header.message_type, error.header.serial, error.body) == (jeepney.MessageType.error, 9, ())
    assert error.header.fields == {
        jeepney.HeaderFields.error_name: "org.freedesktop.DBus.Error.LimitsExceeded",
        jeepney.HeaderFields.reply_serial: 7,
        jeepney.HeaderFields.destination: destination,
    }
