"""`longrope`, and `python -m longrope`, which launchers such as torchrun start."""

from typing import NoReturn

from longrope.launched import block_signals


def main() -> NoReturn:
    """Run the command line and end the process."""
    block_signals()  # before the imports, which start threads
    from longrope.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
