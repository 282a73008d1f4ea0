"""What fits on a terminal, and how: whole screens of the command, and what holds for any table and any text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuswitch.cli.layout import fitted, model_in_brief, paired, shortened
from gpuswitch.cli.output import cells, wrapped
from gpuswitch.cli.parser import EXIT_STATUSES, exit_status_lines
from gpuswitch.cli.translate import speak
from tests.harness.screens import HISTORY, SCREENS, WHEN, WIDTHS, file, screens, shown
from tests.harness.service.fixed import gpu

ADDRESS = re.compile(r"\b[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]\b")
NAMES = ("workstation-left", "win11-spiele", "app-org.blender.Blender-4711.scope", "nvidia-persistenced.service")
COMMANDS = (
    "gpuswitchctl recover 0000:c1:00.0",
    "gpuswitchctl doctor 0000:c1:00.0",
    "gpuswitchctl to-vfio 0000:41:00.0",
    "kill 4711",
    '`address = "0000:c1:00.0"`',
    "systemctl --user --machine=alice@ stop app-org.blender.Blender-4711.scope",
    "echo 0 > /sys/class/vtconsole/vtcon1/bind",
    '{ vendor = "10de", device = "2484", port = "0000:00:01.0" }',
)


@pytest.mark.parametrize("columns", WIDTHS)
def test_the_screens_are_as_they_were(columns: int) -> None:
    assert screens(columns) == file(columns).read_text(), (
        "people see something else than before; if that is meant: python -m tests.harness.screens"
    )


@pytest.mark.parametrize("columns", WIDTHS)
def test_nothing_that_is_copied_is_broken_on_any_screen(columns: int) -> None:
    """What is shown where there is room is shown whole here, or not at all."""
    for command, knows in SCREENS:
        wide, here = shown(command, 1000, **knows), shown(command, columns, **knows)
        for word in (*ADDRESS.findall(wide), *(word for word in (*NAMES, *COMMANDS) if word in wide)):
            for length in range(5, len(word)):
                begins = word[:length].rstrip()
                assert f"{begins}\n" not in here, f"{word} of {command} at {columns}"
                assert f"{begins}…" not in here, f"{word} of {command} at {columns}"


@pytest.mark.parametrize("columns", WIDTHS)
def test_no_line_is_wider_than_the_screen_but_for_what_is_copied(columns: int) -> None:
    for command, knows in SCREENS:
        for line in shown(command, columns, **knows).splitlines():
            value = line.partition(": ")[2] or line
            assert cells(line) <= columns or " " not in value.strip() or value.strip(" ,") in COMMANDS, line


def test_a_table_of_toml_is_not_broken_either() -> None:
    match = '{ vendor = "10de", device = "2484", port = "0000:00:01.0" }'
    assert wrapped(f"it is {match}", 40, indent="  ") == ["it is", f"  {match}"]


def test_who_asked_by_the_command_is_told_by_their_name_where_there_is_little_room() -> None:
    assert "gpuswitchctl of uid 4000000000 for win11-spiele" in shown("history", 200)
    assert "  uid 4000000000 for win11-spiele" in shown("history", 120)
    assert "gpuswitchctl" not in shown("history", 120).partition("\n")[2]


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 120])
def test_who_asked_is_told_whole_whatever_room_there_is(columns: int) -> None:
    assert "uid 4000000000 for win11-spiele" in " ".join(shown("history", columns).split())


def test_the_time_zone_of_a_list_is_told_once() -> None:
    heading, *lines = shown("history", 200, zone="IST-5:30").splitlines()
    assert heading.startswith("WHEN (+05:30)  ")
    assert [line[:21] for line in lines if line[0] == "2"] == ["2023-11-15 03:43:20  "] * len(HISTORY)
    blocks = shown("history", 40, zone="IST-5:30")
    assert "when (+05:30): 2023-11-15 03:43:20\n" in blocks


def test_times_of_two_zones_have_theirs_each() -> None:
    """Summer time is over between them."""
    summer = {**HISTORY[0], "started": WHEN - 150 * 86400, "finished": WHEN - 150 * 86400 + 1}
    heading, *lines = shown(
        "history", 200, zone="CET-1CEST,M3.5.0,M10.5.0/3", history=(HISTORY[0], summer)
    ).splitlines()
    assert heading.startswith("WHEN     ")
    assert [line[:25] for line in lines] == ["2023-11-14 23:13:20+01:00", "2023-06-18 00:13:20+02:00"]


def test_what_stands_before_a_value_is_written_as_its_language_has_it() -> None:
    """A noun of German has a capital, whatever the heading looks like."""
    speak("de")
    said = shown("holders", 40)
    assert re.search(r"^ *Programm: blender$", said, re.MULTILINE)
    assert re.search(r"^ *hat offen: seine Deskriptoren", said, re.MULTILINE)
    assert re.search(r"^ *wann \(\+00:00\): 2023", shown("history", 40), re.MULTILINE)


def test_a_column_goes_below_its_row_once_leaving_out_does_not_do() -> None:
    headings, rows = ("ID", "TOOK", "ASKED BY", "REASON"), [["5f", "9 ms", "the service itself", "x" * 30]]
    below, left_out = ("ASKED BY", "REASON"), ("TOOK",)
    assert fitted(headings, rows, 34, below=below, left_out=left_out)[2] == f"5f  9 ms  {rows[0][2]}"
    assert fitted(headings, rows, 22, below=below, left_out=left_out)[2] == f"5f  {rows[0][2]}"
    assert fitted(headings, [["5f", "9 ms", "the service itself", "-"]], 21, below=below) == [
        "ID  TOOK",
        "5f  9 ms",
        "    asked by: the",
        "    service itself",
    ]


def test_a_column_below_its_row_that_is_empty_leaves_no_line_behind() -> None:
    rows = [["5f", "x" * 30, "-"], ["60", "x" * 30, "-"]]
    headings = ("ID", "NAME", "REASON")
    assert fitted(headings, rows, 38, below=("REASON",)) == ["ID  NAME", *(f"{row[0]}  {row[1]}" for row in rows)]
    assert len(fitted(headings, [*rows, ["61", "y", "why"]], 38, below=("REASON",))) == 6


def test_columns_that_are_left_out_are_named_where_they_say_something() -> None:
    headings = ("GPU", "OWNER", "MANAGED", "MODEL")
    rows = [["0000:01:00.0", "-", "no", "GA104"]]
    assert fitted(headings, rows, 14, left_out=("MODEL", "MANAGED", "OWNER"))[2:] == [
        "no room for",
        "    MODEL,",
        "    MANAGED:",
        "    shown on a",
        "    wider",
        "    terminal,",
        "    and by",
        "    --json",
    ]
    # Nobody misses what says nothing.
    assert fitted(("GPU", "OWNER"), [["0000:01:00.0", "-"]], 14, left_out=("OWNER",)) == ["GPU", "0000:01:00.0"]


GEFORCE = gpu(Model="NVIDIA Corporation GA104 [GeForce RTX 3070]")


@pytest.mark.parametrize(
    ("columns", "lines"),
    [
        (
            200,
            [
                "GPU           NAME  STATE        OWNER  MANAGED  DRIVER  GROUP  MODEL",
                f"0000:01:00.0  -     host-nvidia  -      no       nvidia  13     {GEFORCE['Model']}",
            ],
        ),
        (
            80,
            [
                "GPU           NAME  STATE        OWNER  MANAGED  DRIVER  GROUP  MODEL",
                "0000:01:00.0  -     host-nvidia  -      no       nvidia  13     GeForce RTX 3070",
            ],
        ),
        (
            70,
            [
                "GPU           STATE        OWNER  MANAGED  DRIVER  GROUP  MODEL",
                "0000:01:00.0  host-nvidia  -      no       nvidia  13     GeForc…3070",
            ],
        ),
        (
            60,
            [
                "GPU           STATE        OWNER  MANAGED  DRIVER  GROUP",
                "0000:01:00.0  host-nvidia  -      no       nvidia  13",
                "no room for MODEL: shown on a wider terminal, and by --json",
            ],
        ),
        (
            40,
            [
                "GPU           STATE        OWNER",
                "0000:01:00.0  host-nvidia  -",
                "no room for MODEL, DRIVER, GROUP,",
                "    MANAGED: shown on a wider terminal,",
                "    and by --json",
            ],
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_the_model_is_shortened_and_goes_first_and_the_owner_stays(columns: int, lines: list[str]) -> None:
    shown_lines = shown("list", columns, gpus=[GEFORCE]).partition("no GPU is managed")[0].splitlines()
    assert [each for each in shown_lines if not each.startswith("$")] == lines


@pytest.mark.parametrize("columns", range(36, 120))
@pytest.mark.parametrize("owner", ["", "win11"])
def test_who_has_a_gpu_is_told_whatever_room_there_is(columns: int, owner: str) -> None:
    owned = gpu(Name="left", Model=GEFORCE["Model"], Owner=(owner, ""), Adds=["8 virtual functions"])
    heading, *lines = shown("list", columns, gpus=[owned]).splitlines()
    # Without a table, what is nothing has no line.
    assert "OWNER" in heading.split() or f"owner: {owner}".strip() in "\n".join(lines) or not owner
    assert "MODEL" not in heading.split() or "WITH" in heading.split()
    headings = {"GPU", "NAME", "STATE", "OWNER", "MANAGED", "DRIVER", "GROUP", "WITH", "MODEL"}
    missing = headings - {*heading.split()} if "OWNER" in heading.split() else set()
    said = " ".join(" ".join(lines).split())
    assert all(each in said.partition("no room for ")[2].partition(":")[0] for each in missing)


def test_what_there_is_no_room_for_is_told_dim() -> None:
    headings, rows = ("GPU", "MODEL"), [["0000:01:00.0", "GA104"]]
    said = fitted(headings, rows, 14, left_out=("MODEL",), colour=True)[2:]
    assert said
    assert all(each.startswith("\x1b[2m") and each.endswith("\x1b[0m") for each in said)


@pytest.mark.parametrize(
    ("model", "brief"),
    [
        ("NVIDIA Corporation GA104 [GeForce RTX 3070]", "GeForce RTX 3070"),
        ("Advanced Micro Devices, Inc. [AMD/ATI] Navi 21 [Radeon RX 6800/6800 XT]", "Radeon RX 6800/6800 XT"),
        ("NVIDIA Corporation AD102GL [RTX 6000 Ada] (rev a1, Lenovo)", "RTX 6000 Ada"),
        ("Advanced Micro Devices, Inc. [AMD/ATI] Raphael", "Advanced Micro Devices, Inc. [AMD/ATI] Raphael"),
        ("NVIDIA Corporation GA104", "NVIDIA Corporation GA104"),
    ],
)
def test_a_model_in_brief_is_what_it_is_sold_as(model: str, brief: str) -> None:
    assert model_in_brief(model) == brief


def test_what_groups_have_no_room_for_is_called_as_people_do() -> None:
    said = " ".join(" ".join(shown("groups", 40).split("no room for")[1:]).split())
    assert said == "model, remarks, PCI ids of each function: shown on a wider terminal, and by --json"


@pytest.mark.parametrize("language", ["en", "de", "fr", "zh_CN"])
def test_exit_statuses_stand_in_columns_that_fit(language: str) -> None:
    speak(language)
    try:
        for columns in (38, 78, 198):
            lines = exit_status_lines(columns)
            assert columns == 38 or all(cells(line) <= columns for line in lines)
            numbers = [[int(word) for word in line.split() if word.isdecimal()] for line in lines]
            assert sorted(chain(*numbers)) == [status for status, _meaning in EXIT_STATUSES if status != 141]
            assert len(lines) == (10 if columns == 38 else 5)
    finally:
        speak("en")


# Any table, any text

WORDS = st.text(st.characters(codec="utf-8", categories=["L", "N", "Pd", "So"]), min_size=1, max_size=30)
TEXTS = st.lists(WORDS, min_size=1, max_size=8).map(" ".join)
ADDRESSES = st.from_regex(ADDRESS, fullmatch=True)
HEADINGS = ("GPU", "NAME", "TO FREE IT", "WITH", "MODEL")
ROWS = st.lists(st.tuples(ADDRESSES, WORDS, st.sampled_from(COMMANDS), TEXTS, TEXTS).map(list), min_size=1, max_size=5)
COLUMNS = st.integers(1, 250)


def table(rows: Sequence[Sequence[str]], columns: int) -> list[str]:
    return fitted(HEADINGS, rows, columns, elastic=("MODEL", "WITH"), left_out=("MODEL", "WITH"))


@given(ROWS)
def test_in_a_pipe_nothing_of_a_table_is_shortened(rows: list[list[str]]) -> None:
    heading, *lines = table(rows, 0)
    assert heading.split("  ")[0] == "GPU"
    assert len(lines) == len(rows)
    for row, line in zip(rows, lines, strict=True):
        assert all(cell in line for cell in row)
    begins = [[line.index(cell) for cell in row[:1]] for row, line in zip(rows, lines, strict=True)]
    assert begins == [[0]] * len(rows)


@given(ROWS, COLUMNS)
def test_a_table_is_no_wider_than_the_screen_and_breaks_nothing(rows: list[list[str]], columns: int) -> None:
    lines = table(rows, columns)
    for line in lines:
        value = line.partition(": ")[2] or line
        assert cells(line) <= columns or " " not in value.strip() or value in COMMANDS
    for address, name, command, *_ in rows:
        for whole in (address, name, command):
            assert any(whole in line for line in lines)


@given(ROWS)
def test_a_column_goes_before_one_that_is_copied_does(rows: list[list[str]]) -> None:
    """The table stays one for as long as what is copied fits; the model is shortened first, and goes first."""
    needed = sum(max(cells(row[place]) for row in [list(HEADINGS), *rows]) for place in range(3)) + 2 * 2
    assert table(rows, needed)[0].split() == ["GPU", "NAME", "TO", "FREE", "IT"]
    assert table(rows, needed - 1)[0].lstrip().startswith("gpu: ")
    widest = max(map(cells, table(rows, 0)))
    assert table(rows, widest) == table(rows, 0)
    assert all(cells(line) < widest for line in table(rows, widest - 1))


@given(TEXTS, st.sampled_from(COMMANDS), TEXTS, COLUMNS)
def test_a_text_is_broken_between_words_and_not_within_a_command(
    before: str, command: str, after: str, columns: int
) -> None:
    text = f"{before}, or: {command}; {after}"
    lines = wrapped(text, columns, indent="  ")
    assert " ".join(line.removeprefix("  ") for line in lines) == text
    assert any(command in line for line in lines)
    for line in lines:
        assert cells(line) <= columns or " " not in line.strip() or line.strip().rstrip(";") == command
    # No line is begun that the one before had room for.
    for line, following in pairwise(lines):
        assert cells(line) + 1 + cells(following.split()[0]) > columns or following.split()[0] in command


@given(TEXTS)
def test_in_a_pipe_a_text_is_one_line(text: str) -> None:
    assert wrapped(text, 0) == [text]
    assert list(paired([("label", text)], 0)) == [f"label: {text}"]


@given(TEXTS, st.integers(3, 60))
def test_what_is_shortened_keeps_its_beginning_and_its_end(text: str, columns: int) -> None:
    short = shortened(text, columns)
    if cells(text) <= columns:
        assert short == text
        return
    head, mark, tail = short.partition("…")
    assert (cells(short) <= columns, mark, text.startswith(head)) == (True, "…", True)
    assert text.rstrip().endswith(tail)
    # No more is taken out than has to be: a wide character and a space at either end may not fit.
    assert cells(short) >= columns - 4
