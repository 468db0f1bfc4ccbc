"""`python -m longrope`, which launchers such as torchrun start."""

from longrope.cli import main

main()
