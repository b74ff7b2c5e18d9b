"""A worker process: `python -m sepcap.workers.process '{"path": …}'`, started by `sepcap.workers.engines.Process`.

It reads arguments, one line of standard input for each call of `run`, and answers with a line. When standard input ends, so does the
process, at once: whoever started it is gone, and another call may want to write where it writes.
"""

import json
import os
import queue
import signal
import sys
import threading
from typing import Any, BinaryIO

import torch

from sepcap.workers.engines import Target


def main() -> None:
    """Answer lines until they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the driver too, which ends this process
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print goes to the log
    target = Target(**json.loads(sys.argv[1]))
    torch.set_num_threads(target.threads)
    made = target.made()
    asked: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_read, args=(asked,), daemon=True).start()
    _answer(answers, {"ready": os.getpid()})
    while True:
        _answer(answers, made.run(**asked.get()))


def _read(asked: "queue.Queue[dict[str, Any]]") -> None:
    for line in sys.stdin.buffer:
        asked.put(json.loads(line))
    os._exit(0)


def _answer(answers: BinaryIO, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    main()
