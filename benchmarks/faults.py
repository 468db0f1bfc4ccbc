"""Kills, crashes, full disks, damaged files, signals and clocks: what they do to every command, and what is lost.

    python benchmarks/faults.py                        # all parts, on 2 quiet cores: see docs/benchmarks.md
    python benchmarks/faults.py --parts kills,writes   # some of them
    python benchmarks/faults.py --commands extend      # on some commands

Every command runs undisturbed first. Then faults are put into it, one or a few at a time, in processes forked from one
that has imported everything, and what it leaves behind in the end is compared with what it left undisturbed. Parts that
earlier calls of the same campaign have made stay in the JSON, so that it can be made in several calls.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from faulting import shim

_LIBRARY = "LONGROPE_FAULTS_SO"


def main() -> int:
    from faulting.campaign import PARTS, campaign
    from faulting.commands import BY_NAME

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few faults of each kind: a check of the script")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--commands", default=",".join(BY_NAME), help="by the names of the table")
    parser.add_argument("--every", type=int, metavar="N", help="of writes and damage only each N-th case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N", help="cases at once")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    parser.add_argument("--keep-going", type=int, default=20, metavar="N", help="troubles shown as they come")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        return campaign(args, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def started_anew() -> None:
    """Become a process with one thread and the library of faults, where a compiler makes it."""
    if _LIBRARY in os.environ:
        return
    folder = Path(tempfile.mkdtemp(prefix="faults-library-"))
    library = shim.build(folder) if shim.compiler() else None
    environment = shim.environment(library) | {_LIBRARY: str(folder)}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


if __name__ == "__main__":
    started_anew()
    try:
        sys.exit(main())
    finally:
        shutil.rmtree(os.environ[_LIBRARY], ignore_errors=True)
