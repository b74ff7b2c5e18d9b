"""The `sepcap` command. Handlers for Ctrl-C, SIGTERM and SIGHUP are set before other imports, so that no signal ends in a traceback."""

import signal
import sys
from types import FrameType

NAMES = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM", "SIGHUP": "SIGHUP"}


class Stopped(KeyboardInterrupt):
    """A signal that ends the command; code that cleans up after Ctrl-C cleans up after all of these signals.

    Attributes:
        by: name of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.by = number, NAMES[signal.Signals(number).name]


def main() -> None:
    """Entry point: set the signal handlers, import the rest, run the command, and exit with its status."""
    stopped: list[Stopped] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(Stopped(number))
        raise stopped[-1]

    for name in NAMES:
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        # signals that nohup ignores stay ignored
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        from sepcap.cli.main import main as run

        run(stopped=stopped)
    except BaseException as error:  # also what a library raises if its import is interrupted
        if not stopped:
            raise
        if not isinstance(error, SystemExit):
            print(f"\nsepcap: stopped by {stopped[-1].by} before anything was done; run the same command again", file=sys.stderr)
        sys.exit(128 + stopped[-1].number)
    finally:
        for name in NAMES:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)


if __name__ == "__main__":
    main()
