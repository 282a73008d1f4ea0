"""What a terminal gets instead of plain lines. Imported for a terminal only: `rich` takes longer than all the rest."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from typing import Any, TextIO, cast

from rich.bar import Bar
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gpuswitch.cli.client import Gpu
from gpuswitch.cli.follow import StepChange, Waiting, at_work
from gpuswitch.cli.interrupts import ending_in_order, not_stopped, stopping_in_order
from gpuswitch.cli.output import clean, duration, in_foreground, numbered, wrapped
from gpuswitch.cli.steps import SHORTEST_BAR, Headings, Lines, took_words
from gpuswitch.cli.translate import _, recognized, state_word, step_title

_SHORTEST = 1 / 40
"""Of the whole width: a bar as long as that can be seen, however short the step was."""
_BAR_COLUMNS = 40
_SECONDS = 0.1
"""From one painting to the next."""
_INDENT = "  "
_STEP_STYLES = {
    "done": "green",
    "failed": "bold red",
    "cancelled": "yellow",
    "reverted": "yellow",
    "revert-failed": "bold red",
    "interrupted": "bold red",
}


def print_timeline(entry: Mapping[str, Any], steps: Iterable[Mapping[str, Any]]) -> None:
    """One bar for each of these steps of a finished switch, placed in time; what was taken back or failed has another
    colour.
    """
    console = Console()
    grid = Table(box=None, pad_edge=False, expand=True, show_header=False)
    grid.add_column(justify="right")
    grid.add_column(max_width=console.width * 2 // 5, overflow="fold")
    grid.add_column(ratio=1, min_width=SHORTEST_BAR)
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    whole = max(entry["finished"] - entry["started"], 1e-6)
    for step in steps:
        begin = min(step["started"] - entry["started"], whole * (1 - _SHORTEST))
        end = begin + max(step["seconds"], whole * _SHORTEST)
        status = step["status"]
        style = _STEP_STYLES.get(status, "")
        bar = Bar(whole, begin, end, color=style.removeprefix("bold ") or "default")
        took = took_words(step)
        grid.add_row(
            str(step["index"]),
            Text(clean(step_title(step["title"]))),
            bar,
            Text(clean(state_word(status)), style),
            Text(took, "dim"),
        )
    console.print(grid)


class _AtWork:
    """A step that runs, as far as it was heard of; `begun` is when, by the monotonic clock."""

    def __init__(self, change: StepChange) -> None:
        self.change = change
        self.begun = time.monotonic() - change.seconds
        self.waiting: Waiting | None = None


class _Lasting:
    """A terminal that may hang up meanwhile: that ends the command where it waits for the service
    (`Service.end_with_its_reader`), and neither a thread of `rich` nor what puts the cursor back.
    """

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._terminal, name)

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._terminal.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._terminal.flush()


class StepsInPlace:
    """The steps at work with a running clock, what they wait for, and a bar over the whole, redrawn in place. The line
    of a step stays when it ended. `several`: each names its GPU.

    In the background, plain lines as in a pipe.
    """

    def __init__(self, *, several: bool = False) -> None:
        self._terminal = sys.stdout
        self._console = Console(file=cast("TextIO", _Lasting(sys.stdout)))
        self._in_order = ExitStack()
        self._several = several
        self._plain = Lines(several=several)
        self._headings = Headings()
        self._lock = threading.RLock()
        """For all who write there: a thread that paints, who tells of steps, and handlers of signals."""
        self._live: Live | None = None
        """What is painted; None: nothing is."""
        self._has_begun = False
        self._paused = False
        self._over = threading.Event()
        self._at_work: dict[str, _AtWork] = {}
        self._between: dict[str, StepChange] = {}
        """The last step of each that has ended, where the next is about to begin."""

    def __enter__(self) -> StepsInPlace:
        # Whoever ends or stops us gets the cursor back, which is hidden meanwhile.
        self._in_order.enter_context(ending_in_order(signal.SIGTERM, signal.SIGQUIT))
        self._in_order.enter_context(stopping_in_order(self._put_away, self._take_up))
        with not_stopped():  # the thread has this from us, for good: it is this one that is told of ^Z
            threading.Thread(target=self._paint_on, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._put_away()
        self._in_order.close()

    def _paint_on(self) -> None:
        # That it comes to the foreground is seen by looking: a shell sends SIGCONT to what was stopped alone.
        while not self._over.wait(_SECONDS):
            self._paint()

    def _paint(self) -> bool:
        """False: we are in the background, where it is not to be done."""
        with not_stopped(), self._lock:
            if not in_foreground(self._terminal):
                self._leave()
                return False
            # Without a step, it would leave an empty line.
            if self._has_begun and not self._paused:
                if self._live is None:
                    self._live = self._new_live()
                    self._live.start()
                self._live.refresh()
            return True

    def _new_live(self) -> Live:
        # Its own thread knows of no background. Nobody prints meanwhile but by its console.
        return Live(
            self,
            console=self._console,
            transient=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def _leave(self) -> None:
        """What is painted stays: somebody else has written there since (SIGSTOP, then `bg`)."""
        if self._live is not None:
            self._live = None
            self._console.pop_render_hook()
            self._console.clear_live()
            self._console.show_cursor(show=True)

    def _put_away(self) -> None:
        with not_stopped(), self._lock:
            self._paused = True
            if not in_foreground(self._terminal):
                self._leave()
            elif self._live is not None:
                self._live.stop()
                self._live = None

    def _take_up(self) -> None:
        with not_stopped(), self._lock:
            self._paused = False
            self._paint()

    def joined(self, _gpu: Gpu, sentence: str) -> None:
        with not_stopped(), self._lock:
            for each in wrapped(clean(sentence), self._console.width, indent="  "):
                self._console.print(Text(each))

    def step(self, of: Gpu, switch: str, change: StepChange) -> None:
        with not_stopped(), self._lock:
            self._has_begun = True
            self._take(of.title, change)
            if not self._paint():
                self._plain.step(of, switch, change)
            elif not at_work(change):
                if heading := self._headings.above(of, switch, change):
                    self._console.print(Text(f"{clean(of.title)}  {heading}" if self._several else heading))
                self._print_ended(of.title, change)

    def lasts(self, of: Gpu, switch: str, change: StepChange) -> None:
        """Its clock runs; in the background, none does."""
        with not_stopped(), self._lock:
            if not self._paint():
                self._plain.lasts(of, switch, change)

    def _take(self, gpu: str, change: StepChange) -> None:
        if at_work(change):
            self._between.pop(gpu, None)
            self._at_work[gpu] = _AtWork(change)
            return
        self._at_work.pop(gpu, None)
        self._between[gpu] = change
        if change.index == change.count or change.status != "done":
            del self._between[gpu]

    def _print_ended(self, gpu: str, change: StepChange) -> None:
        style = _STEP_STYLES.get(change.status, "")
        took = (f"  {duration(change.seconds)}", "dim")
        text = Text.assemble(f"{self._title(gpu, change)}  ", (clean(state_word(change.status)), style), took)
        for each in _fitted(text, self._console, self._console.width):
            self._console.print(each)

    def waits(self, of: Gpu, switch: str, waiting: Waiting) -> None:
        with not_stopped(), self._lock:
            if of.title in self._at_work:
                self._at_work[of.title].waiting = waiting
            if not self._paint():
                self._plain.waits(of, switch, waiting)

    def _title(self, gpu: str, change: StepChange) -> str:
        title = numbered(change.index, change.count, change.title)
        return f"{clean(gpu)}  {title}" if self._several else title

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What is redrawn; called from a thread of `rich`."""
        # The terminal shows ^C behind the bar, as the last line: on one more, a line of ours would stay above that.
        columns = max(min(options.max_width - len("^C") - 1, _BAR_COLUMNS), 1)
        # In other threads, these change.
        at_work, between = dict(self._at_work), dict(self._between)
        for gpu in sorted({*at_work, *between}):
            if gpu in at_work:
                for each in self._lines(gpu, at_work[gpu]):
                    yield from _fitted(each, console, options.max_width)
                change = at_work[gpu].change
                yield ProgressBar(total=change.count, completed=change.index - 1, width=columns)
            else:
                yield ProgressBar(total=between[gpu].count, completed=between[gpu].index, width=columns)

    def _lines(self, gpu: str, step: _AtWork) -> Iterator[Text]:
        change = step.change
        elapsed = (f"  {time.monotonic() - step.begun:.1f} s", "dim")
        yield Text.assemble(f"{self._title(gpu, change)}  ", (clean(state_word(change.status)), "cyan"), elapsed)
        if (waiting := step.waiting) is not None:
            for number, each in enumerate(recognized(waiting.what).splitlines()):
                what, left = clean(each), f"{max(waiting.until - time.time(), 0):.0f}"
                if number:
                    text = _("and: {what}", what=what)
                elif waiting.until:
                    text = _("waiting ({seconds} s left): {what}", seconds=left, what=what)
                else:
                    text = _("waiting: {what}", what=what)
                yield Text(f"  {text}", "yellow")


def _fitted(text: Text, console: Console, columns: int) -> Iterator[Text]:
    """The text in lines of so many columns, the further ones indented as of whatever else is too long."""
    if text.cell_len <= columns:
        yield text
        return
    first, *more = text.wrap(console, max(columns - len(_INDENT), 1))
    yield first
    yield from (Text(_INDENT).append_text(each) for each in more)
