"""How much memory a process may still take before the kernel or a container's limit would step in."""

from __future__ import annotations

import contextlib
from pathlib import Path

ROOT = Path("/")


def available_bytes(root: Path = ROOT) -> int:
    """The least of what the machine has available and what each control group above this process has left.

    File caches that the kernel would give back count as available.

    Args:
        root: where /proc and /sys are found.

    Raises:
        OSError: no /proc/meminfo with MemAvailable there: not Linux.
    """
    fields = _fields(root / "proc/meminfo")
    if "MemAvailable:" not in fields:
        raise OSError(f"{root}proc/meminfo does not say what memory is available")
    return max(0, min([1024 * fields["MemAvailable:"], *_left_in_groups(root)]))


def _left_in_groups(root: Path) -> list[int]:
    """Of version 2 and 1 of control groups, from this process's own group up to the root of what it sees."""
    left: list[int] = []
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return left
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            base = root / "sys/fs/cgroup" / controllers
            group = base / path.lstrip("/")
            folders = [group, *group.parents]
            left += [room for folder in folders if folder.is_relative_to(base) for room in _left_in(folder)]
    return left


def _left_in(group: Path) -> list[int]:
    """What a group's limit leaves, the caches it would give back included; nothing where it has no limit."""
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            allowed, used = (int((group / name).read_text(encoding="ascii")) for name in (limit, usage))
            return [allowed - used + _fields(group / "memory.stat").get(cache, 0)]
    return []


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name, a number and perhaps a unit."""
    fields: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="ascii", errors="replace").splitlines():
            name, *rest = line.split()
            if rest and rest[0].isdigit():
                fields[name] = int(rest[0])
    return fields
