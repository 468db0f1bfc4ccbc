"""`longrope`, and `python -m longrope`, which launchers such as torchrun start."""

import os
import sys
from typing import NoReturn

from longrope.launched import block_signals


def main() -> NoReturn:
    """Run the command line and end the process."""
    _open_streams()
    block_signals()  # before the imports, which start threads
    from longrope.cli import main as command_line

    command_line()


def _open_streams() -> None:
    """Open what a daemon or a shell (2>&-) has closed: the next files would get its numbers, and what is said there."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free, which is this one.
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            os.set_inheritable(number, True)  # what a command starts has it, too
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


if __name__ == "__main__":
    main()
