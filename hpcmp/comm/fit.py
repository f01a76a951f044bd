"""Which sizes of a mesh's axes fit one another, and what to say of those that do not."""

from __future__ import annotations

import math

from ..errors import InputError


def check_size(shape: dict[str, int], ranks: int, **cuts: int) -> None:
    """Raise InputError unless the axes of ``shape`` make ``ranks``, with each axis whose change alone would do, as far
    as the cuts (see ``check_cuts``) go with it."""
    size = math.prod(shape.values())
    if size == ranks:
        return
    fits = []
    for axis, n in shape.items():
        changed = shape | {axis: ranks * n // size}
        try:
            if ranks * n % size == 0:
                check_cuts(**{name: changed[name] for name in ("dp", "cp", "tp_z")}, **cuts)
                fits.append(f"{axis}={changed[axis]}")
        except InputError:
            continue
    product = " x ".join(f"{axis}={n}" for axis, n in shape.items() if n > 1 or axis in ("dp", "pp", "tp"))
    told = f"{' or '.join(fits) or f'dp={ranks} alone'} would fit"
    raise InputError(f"layout: {product} needs {size} ranks, and there are {ranks}; {told}")


def check_cuts(*, dp: int, cp: int, tp_z: int, ulysses: int, ep: int, shard: int) -> None:
    """Raise InputError, with what would fit, unless ``ulysses`` divides cp, ``ep`` and ``shard`` (layout.zero_group)
    divide dp x cp x tp_z, and one of these two the other."""
    data, problems = dp * cp * tp_z, []
    of = " x ".join(["layout.dp", *(f"layout.{axis}" for axis, n in (("cp", cp), ("tp_z", tp_z)) if n > 1)])
    if cp % ulysses:
        problems.append(f"layout.ulysses = {ulysses} does not divide layout.cp = {cp}; {_near(ulysses, divisors(cp))}")
    fits = [n for n in divisors(data) if data % shard or n % shard == 0 or shard % n == 0]
    if data % ep:
        problems.append(f"layout.ep = {ep} does not divide {of} = {data}; {_near(ep, fits)}")
    fits = [1, data] if data % ep else [n for n in divisors(data) if n % ep == 0 or ep % n == 0]
    clash = data % ep == data % shard == 0 and shard not in fits
    fits = [n for n in fits if n % tp_z == 0]  # the ranks of tp_z share weights whatever else is sharded
    if data % shard:
        problems.append(f"layout.zero_group = {shard} does not divide {of} = {data}; {_near(shard, fits)}")
    if clash:
        problems.append(
            f"of layout.ep = {ep} and layout.zero_group = {shard} neither divides the other; "
            f"for layout.zero_group {_near(shard, fits)}"
        )
    if problems:
        raise InputError("; ".join(problems))


def divisors(n: int) -> list[int]:
    """All of them, in order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def _near(value: int, fits: list[int]) -> str:
    """The six of ``fits`` that are nearest to ``value``, in words."""
    *most, last = sorted(sorted(set(fits), key=lambda n: abs(math.log(n / value)))[:6])
    return f"{', '.join(map(str, most))} or {last} would fit" if most else f"{last} would fit"
