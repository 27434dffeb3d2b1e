"""Live progress of a run: a bar with the figures that matter on a terminal, plain lines anywhere else."""

import os
import signal
import sys
import time

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from stoker.observe.events import CheckpointSaved, Evaluated, Event, Notice, RunEnded, RunStarted, StepLogged
from stoker.observe.observer import Observer


class RunConsole(Console):
    """Standard output of a run, which saves and ends, as SIGTERM has it do, once nobody reads that any more."""

    def on_broken_pipe(self) -> None:
        """Lets what is still printed go nowhere, says so on standard error, and ends the run."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        os.write(2, b"\nNobody reads standard output any more, so the run ends.\n")
        signal.raise_signal(signal.SIGTERM)


def build(console: Console | None = None) -> Observer:
    """Returns the display that suits `console` (standard output by default): live on a terminal, lines otherwise."""
    console = console or Console()
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)


def duration(seconds: float) -> str:
    """Returns seconds as `42s`, `3m07s` or `2h05m`."""
    minutes, whole = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole:02d}s" if minutes else f"{whole}s"


def size(num_bytes: float) -> str:
    """Returns bytes as `512 B`, `3.4 MiB` or `17.2 GiB` (powers of 1024)."""
    value, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    unit = 0
    while value >= 1024 and unit < len(units) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.1f} {units[unit]}"


def _evaluation_text(event: Evaluated) -> str:
    best = ", best so far" if event.best else ""
    return f"step {event.step}: {event.split} loss {event.loss:.4f} ({event.num_trained_tokens:,} tokens{best})"


def _checkpoint_text(event: CheckpointSaved) -> str:
    return f"step {event.step}: checkpoint {event.folder} ({size(event.num_bytes)}, {event.seconds:.1f}s)"


class PlainProgress:
    """One line per logged step, at most one every `interval_seconds`; evaluations and notices always."""

    def __init__(self, console: Console, *, interval_seconds: float = 2.0) -> None:
        self._console = console
        self._interval = interval_seconds
        self._last = 0.0
        self._started = time.monotonic()
        self._first_step = 0

    def handle(self, event: Event) -> None:
        """Prints a line for the event if there is something to say."""
        match event:
            case RunStarted():
                self._started, self._first_step = time.monotonic(), event.first_step
                self._say(f"training: {event.total_steps:,} steps, {event.steps_per_epoch:,} an epoch")
            case StepLogged():
                self._step(event)
            case Evaluated():
                self._say(_evaluation_text(event))
            case CheckpointSaved():
                self._say(_checkpoint_text(event))
            case Notice():
                self._say(f"{event.level}: {event.message}" if event.level != "info" else event.message)
            case RunEnded():
                self._say(f"{event.reason} after step {event.step:,} in {duration(event.seconds)}")

    def close(self) -> None:
        """Nothing is held."""

    def _step(self, event: StepLogged) -> None:
        now = time.monotonic()
        is_edge = event.step in (self._first_step + 1, event.total_steps)
        if not is_edge and now - self._last < self._interval:
            return
        self._last = now
        done = event.step - self._first_step
        left = (now - self._started) / done * (event.total_steps - event.step)
        self._say(
            f"step {event.step}/{event.total_steps}  loss {event.loss:.4f}  lr {event.learning_rate:.2e}"
            f"  grad {event.gradient_norm:.3f}  {event.tokens_per_second:,.0f} tok/s  padding {event.padding_share:.1%}"
            f"  memory {size(event.memory_bytes)}  left {duration(left)}"
        )

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveProgress:
    """A live bar with loss, learning rate, throughput, padding, memory and time left; messages scroll above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
        )
        self._task = self._bar.add_task("training", total=None)
        self._step: StepLogged | None = None
        self._validation: Evaluated | None = None
        self._live: Live | None = None

    def handle(self, event: Event) -> None:
        """Updates the bar, or prints a line above it."""
        match event:
            case RunStarted():
                self._start(event)
            case StepLogged():
                self._step = event
                self._bar.update(self._task, completed=event.step)
                self._refresh()
            case Evaluated():
                self._validation = event
                self._console.print(f"[cyan]{escape(_evaluation_text(event))}[/]", highlight=False)
            case CheckpointSaved():
                self._console.print(f"[dim]{escape(_checkpoint_text(event))}[/]", highlight=False, soft_wrap=True)
            case Notice():
                style = "yellow" if event.level == "warning" else "dim"
                self._console.print(f"[{style}]{escape(event.message)}[/]", highlight=False, soft_wrap=True)
            case RunEnded():
                self.close()
                text = f"{event.reason} after step {event.step:,} in {duration(event.seconds)}"
                self._console.print(f"[bold]{escape(text)}[/]", highlight=False)

    def close(self) -> None:
        """Ends the live display and leaves its last state on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _start(self, event: RunStarted) -> None:
        self._bar.update(self._task, total=event.total_steps, completed=event.first_step)
        self._live = Live(self._panel(), console=self._console, refresh_per_second=4, transient=False)
        self._live.start()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._panel())

    def _panel(self) -> Table:
        grid = Table.grid(expand=True)
        grid.add_row(self._bar)
        grid.add_row(self._figures())
        return grid

    def _figures(self) -> str:
        step = self._step
        if step is None:
            return "[dim]first step …[/]"
        figures = [
            f"loss [bold]{step.loss:.4f}[/]",
            f"lr {step.learning_rate:.2e}",
            f"grad {step.gradient_norm:.3f}",
            f"{step.tokens_per_second:,.0f} tok/s",
            f"padding {step.padding_share:.1%}",
            f"memory {size(step.memory_bytes)}",
            f"epoch {step.epoch:.2f}",
        ]
        if self._validation is not None:
            figures.insert(1, f"{self._validation.split} [bold]{self._validation.loss:.4f}[/]")
        return "  ".join(figures)
