"""The command line: the same dataclasses as the Python interface, as commands.

No heavy package is imported before a command is parsed, so that --help is fast.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import tyro

from sepcap.cli.ablations import Ablate, AblateEach, Examine
from sepcap.cli.check import Check
from sepcap.cli.compare import Compare
from sepcap.cli.core import Evaluate, Models, Score, Tasks
from sepcap.cli.geometry import Geometry
from sepcap.cli.modules import Modules
from sepcap.cli.paragraphs import Paragraphs
from sepcap.cli.pruning import Certify, Demo, Jumps, LearnRanking, Prune
from sepcap.cli.running import ended, parsed, versions
from sepcap.cli.studies import Report, Reproduce, Sweep

COMMANDS = {
    "demo": Demo,
    "prune": Prune,
    "sweep": Sweep,
    "jumps": Jumps,
    "learn-ranking": LearnRanking,
    "certify": Certify,
    "score": Score,
    "evaluate": Evaluate,
    "examine": Examine,
    "ablate": Ablate,
    "ablate-each": AblateEach,
    "compare": Compare,
    "reproduce": Reproduce,
    "modules": Modules,
    "geometry": Geometry,
    "paragraphs": Paragraphs,
    "report": Report,
    "check": Check,
    "models": Models,
    "tasks": Tasks,
}


def main(args: Sequence[str] | None = None, *, stopped: Sequence[Any] = ()) -> None:
    """Run one command.

    Args:
        args: its words; default is those of the command line. A hidden --debug shows the traceback of an error.
        stopped: contains a signal once one was received, whatever a library did with it (`sepcap.__main__`).
    """
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if words == ["--version"]:
        print(versions())
        return
    command = None
    try:
        command = parsed(partial(_parse, words), " ".join(["sepcap", *(word for word in words[:1] if word in COMMANDS)]), words)
        command.run()
    except (KeyboardInterrupt, Exception) as error:
        ended(error, command, stopped, debug=debug)


def _parse(words: Sequence[str]) -> Any:
    return tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        args=words,
        prog="sepcap",
        # options keep their field names also if a study of a command is chosen
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
        description="Find neurons whose pruning lowers accuracy on one task, and measure what is retained on another. "
        "`sepcap --version` prints the versions.",
    )
