"""What of this machine's own memory is free, and room in it for texts; without torch."""

from __future__ import annotations

import math
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from longrope.errors import UserError


class Room:
    """Memory that texts may take, a quarter of what is free: they are held more than once, and become tokens.

    Raises UserError before more is read than there is room for: a small file can unfold to a very large one.
    """

    def __init__(self, bytes_free: int | None = None) -> None:
        self.all = (free_host_memory() if bytes_free is None else bytes_free) // 4
        self.left = self.all

    def take(self, size: int, where: str) -> None:
        """Take room for a text of so many bytes."""
        self.left -= size
        if self.left < 0:
            got = f"{where}, with which there are more than {self.all / 2**20:,.0f} MiB of text"
            rule = "documents are read whole, into a quarter of the free memory"
            raise UserError("documents", got=got, rule=rule, do="give fewer or smaller ones")


def free_host_memory() -> int:
    """Bytes that can still be taken, of the machine and of its container."""
    return int(min(psutil.virtual_memory().available, _room_of_group()))


def _room_of_group() -> float:
    """What the control group of a container leaves, on Linux; infinite where there is no limit."""
    for folder, limit, used, cache in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        group = Path(folder)
        try:
            room = int((group / limit).read_text()) - int((group / used).read_text())  # "max" is no number
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            return max(0, room + int(stat.get(cache, 0)))  # what can be dropped at once
        except (OSError, ValueError):
            continue
    return math.inf
