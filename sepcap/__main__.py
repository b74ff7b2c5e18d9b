"""The `sepcap` command. Nothing is imported before Ctrl-C, SIGTERM and SIGHUP are in hand, so that they never end in a traceback."""

import signal
import sys
from types import FrameType

NAMES = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM", "SIGHUP": "SIGHUP"}


class Stopped(KeyboardInterrupt):
    """A signal that asks the command to end; whatever tidies up after Ctrl-C tidies up after all of them.

    Attributes:
        by: name of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.by = number, NAMES[signal.Signals(number).name]


def main() -> None:
    """Entry point: take the signals, import what is needed, run the command, and end with a status that says how."""
    stopped: list[Stopped] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(Stopped(number))
        raise stopped[-1]

    for name in NAMES:
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        # what nohup made deaf stays deaf
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        from sepcap.cli import main as run

        run(stopped=stopped)
    except BaseException as error:  # also what a library made of an interrupt while it was imported
        if not stopped:
            raise
        if not isinstance(error, SystemExit):
            print(f"\nsepcap: stopped by {stopped[-1].by} before anything was done; the same command begins again", file=sys.stderr)
        sys.exit(128 + stopped[-1].number)
    finally:
        for name in NAMES:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)


if __name__ == "__main__":
    main()
