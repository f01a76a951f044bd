"""What a container or a batch job may use of its host: cores, their time, memory; by cgroups, version 2 or 1."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/")  # below which /proc and /sys are read: tests have their own


def _group(controller: str) -> list[Path]:
    """The folders of this process's group of ``controller`` and those above it, innermost first."""
    for line in _text(ROOT / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = ROOT / "sys/fs/cgroup" / (controller if controllers else "")
        if not controllers and not (mount / "cgroup.controllers").exists():
            continue
        inner = mount / path.lstrip("/")
        found = [inner, *(parent for parent in inner.parents if parent.is_relative_to(mount))]
        return [folder for folder in found if folder.exists()]  # a container sees itself as the root
    return []


def quota() -> float | None:
    """The cores whose time the group may use, such as 1.5; None without a limit."""
    limits = []
    for folder in _group("cpu"):
        words = _text(folder / "cpu.max").split() or [
            _text(folder / "cpu.cfs_quota_us").strip(),
            _text(folder / "cpu.cfs_period_us").strip(),
        ]
        if len(words) == 2 and all(word.isdigit() for word in words):
            limits.append(int(words[0]) / int(words[1]))
    return min(limits, default=None)


def memory() -> tuple[int, int] | None:
    """The bytes that the group may use, and those that it still has; None without a limit."""
    found = []
    for folder in _group("memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            most = _text(folder / limit).strip()
            if most.isdigit() and int(most) < 2**60:
                cached = dict(line.split() for line in _text(folder / "memory.stat").splitlines() if " " in line)
                free = int(most) - int(_text(folder / used).strip() or 0)
                free += int(cached.get("total_inactive_file", cached.get("inactive_file", 0)))
                found.append((int(most), min(int(most), free)))
    return min(found, key=lambda each: each[1], default=None)


def cores() -> frozenset[int] | None:
    """The cores that the group may use; None where no group says."""
    for folder in _group("cpuset"):
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
            if found := numbers(_text(folder / name)):
                return found
    return None


def numbers(text: str) -> frozenset[int]:
    """The numbers of a list such as ``0-3,8``."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
