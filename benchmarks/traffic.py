"""What a rank sends in one step, for each kind of parallelism: measured (mesh.traffic) beside its closed formula.

    mpirun -n 4 python benchmarks/traffic.py          # the table of docs/traffic.md; 2 and 8 ranks do as well

The model is Llama style without grouped heads, of sizes that the ranks divide, so that every share is even. A formula
is a function of the model and of the sizes of the axes; its docstring is what the table says. What it gives must be
what every rank has sent, by group and operation: equal, not nearly.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpcmp.comm.mesh import DATA, Mesh
from hpcmp.comm.traffic import all_reduced
from hpcmp.training.config import Config, with_layout
from hpcmp.training.engine import Engine, mesh_for
from hpcmp.training.verify import source_of

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

Group = tuple[str, ...]
Sent = Counter[tuple[Group, str]]  # bytes by group and operation


@dataclass(frozen=True)
class Model:
    """Sizes; what a rank holds of them is had by ``dataclasses.replace``. word: bytes of a number."""

    layers: int = 4
    hidden: int = 64
    heads: int = 8
    ffn: int = 128
    vocabulary: int = 128
    sequence: int = 32
    batch: int = 8
    experts: int = 0
    word: int = 4

    @property
    def tokens(self) -> int:
        """S B."""
        return self.sequence * self.batch

    @property
    def A(self) -> int:
        """The bytes of the activations between two layers: S B h numbers."""
        return self.tokens * self.hidden * self.word

    @property
    def G(self) -> int:
        """The bytes of the weights outside experts, or of their gradients."""
        mlp = self.hidden * self.experts if self.experts else 3 * self.hidden * self.ffn
        blocks = self.layers * (4 * self.hidden**2 + mlp + 2 * self.hidden)
        return self.word * (blocks + self.hidden + 2 * self.vocabulary * self.hidden)

    def config(self) -> Config:
        """As a configuration."""
        sizes = {name: getattr(self, name) for name in ("layers", "hidden", "heads", "ffn", "vocabulary", "sequence")}
        experts = {"experts": self.experts, "experts_per_token": self.experts} if self.experts else {}
        train = {"batch": self.batch, "steps": 4, "dtype": {4: "float32", 8: "float64"}[self.word]}
        return Config.from_dict({"model": sizes | experts | {"style": "llama"}, "train": train})


Formula = Callable[[Model, Any, Mesh], Sent]  # of the model, the layout and this rank's place


def data(m: Model, layout: Any, mesh: Mesh) -> Sent:
    """2 (n - 1) / n G"""
    n = layout.data
    return Counter({(DATA, "all_reduce"): 2 * (n - 1) * m.G // n})


def zero_1_and_2(m: Model, layout: Any, mesh: Mesh) -> Sent:
    """2 (n - 1) / n G"""
    half = (layout.shard - 1) * m.G // layout.shard
    return Counter({(("shard",), "reduce_scatter"): half, (("shard",), "all_gather"): half})


def zero_3(m: Model, layout: Any, mesh: Mesh) -> Sent:
    """(n - 1) / n (3 G - H), H the head, which is kept at the turn"""
    n, head = layout.shard, m.word * m.vocabulary * m.hidden
    return Counter(
        {
            (("shard",), "reduce_scatter"): (n - 1) * m.G // n,
            (("shard",), "all_gather"): (n - 1) * (2 * m.G - head) // n,
        }
    )


def tensor(m: Model, layout: Any, mesh: Mesh) -> Sent:
    """2 (n - 1) / n ((4 L + 2) A + 3 T)"""
    n, t = layout.tp, m.tokens * m.word
    return Counter({(("tp",), "all_reduce"): 2 * (n - 1) * ((4 * m.layers + 2) * m.A + 3 * t) // n})


def sequence(m: Model, layout: Any, mesh: Mesh) -> Sent:
    """(n - 1) / n ((10 L + 5) A + 2 (3 T + (2 L + 1) h w))"""
    n, t, norms = layout.tp, m.tokens * m.word, (2 * m.layers + 1) * m.hidden * m.word
    return Counter(
        {
            (("tp",), "all_gather"): (n - 1) * (6 * m.layers + 3) * m.A // n,
            (("tp",), "reduce_scatter"): (n - 1) * (4 * m.layers + 2) * m.A // n,
            (("tp",), "all_reduce"): 2 * (n - 1) * 3 * t // n,
            ((*DATA, "tp"), "all_reduce"): 2 * (n - 1) * norms // n,
        }
    )


def inner(m: Model, layout: Any, mesh: Mesh) -> Sent:
    """2 (n - 1) / n (L (4 + 3 f / h) A + (V + 4 L + 2) T)"""
    n, tp, t = layout.tp_y, layout.tp, m.tokens * m.word
    weights = m.layers * (4 * m.A + 3 * m.ffn * t) // tp + m.vocabulary // tp * t
    return Counter({(("tp_y",), "all_reduce"): 2 * (n - 1) * (weights + (4 * m.layers + 2) * t) // n})


def grid(m: Model, layout: Any, mesh: Mesh) -> Sent:
    """the rows tp (of A / y), tp_y (of L (4 + 3 f / h) A / x and V / x) and ZeRO 3 over z, all of B / z"""
    y, z = layout.tp_y, layout.tp_z
    here = dataclasses.replace(m, batch=m.batch // z)
    n, t = layout.tp, here.tokens * m.word
    sent = inner(here, layout, mesh)
    sent[("tp",), "all_reduce"] = 2 * (n - 1) * ((4 * m.layers + 2) * here.A // y + 3 * t) // n
    norms = (2 * m.layers + 1) * m.hidden * m.word
    held = (m.G - norms) // (n * y) + norms // y
    head = m.word * m.vocabulary * m.hidden // (n * y)
    sent[("shard",), "reduce_scatter"] = (z - 1) * held // z
    sent[("shard",), "all_gather"] = (z - 1) * (2 * held - head) // z
    return sent


def pipeline(m: Model, layout: Any, mesh: Mesh) -> Sent:
    """A to each neighbour: 2 A in the middle"""
    neighbours = (mesh["pp"].rank > 0) + (mesh["pp"].rank < layout.pp - 1)
    return Counter({(("pp",), "send"): neighbours * m.A})


def ring(m: Model, layout: Any, mesh: Mesh) -> Sent:
    """6 L (n - 1) / n A, and as dp"""
    n = layout.cp
    return Counter({(("ring",), "send"): 3 * m.layers * (n - 1) * 2 * m.A // n}) + data(m, layout, mesh)


def ulysses(m: Model, layout: Any, mesh: Mesh) -> Sent:
    """8 L (n - 1) / n^2 A, and as dp"""
    n = layout.cp
    return Counter({(("ulysses",), "all_to_all"): 8 * m.layers * (n - 1) * m.A // n**2}) + data(m, layout, mesh)


def experts(m: Model, layout: Any, mesh: Mesh) -> Sent:
    """4 L k (n - 1) / n^2 A, 8 L (n - 1) e, and as dp but for the experts"""
    n, k = layout.ep, m.experts
    rows = 4 * m.layers * k * (n - 1) * m.A // n**2  # an even load: here k is the number of experts
    counts = m.layers * (n - 1) * m.experts * 8
    routers = m.layers * m.hidden * m.experts * m.word
    others = dataclasses.replace(m, experts=m.experts).G - routers
    return Counter(
        {
            (("ep",), "all_to_all"): rows,
            (("ep",), "all_gather"): counts,
            (DATA, "all_reduce"): 2 * (n - 1) * others // n,
            ((*DATA, "tp"), "all_reduce"): 2 * (n - 1) * routers // n,
        }
    )


def data_and_tensor(m: Model, layout: Any, mesh: Mesh) -> Sent:
    """the rows tp (of B / d) and dp (of matrices / t)"""
    here = dataclasses.replace(m, batch=m.batch // layout.dp)
    norms = (2 * m.layers + 1) * m.hidden * m.word
    held = (m.G - norms) // layout.tp + norms
    n = layout.dp
    return tensor(here, layout, mesh) + Counter({(DATA, "all_reduce"): 2 * (n - 1) * held // n})


def scalars(m: Model, layout: Any, mesh: Mesh) -> Sent:
    """The norm of the gradient, the loss and what goes with it: one sum of 8 numbers over all ranks, in no row."""
    return Counter({(Mesh.axes, "all_reduce"): 8 * all_reduced(8, mesh.size, mesh.rank)})


def rows(n: int) -> list[tuple[str, str, Formula, Model]]:
    """(name, layout, formula, model) for ``n`` ranks."""
    plain, moe = Model(), Model(experts=n)
    table: list[tuple[str, str, Formula, Model]] = [
        ("dp", f"dp={n}", data, plain),
        ("ZeRO 1", f"dp={n},zero=1", zero_1_and_2, plain),
        ("ZeRO 2", f"dp={n},zero=2", zero_1_and_2, plain),
        ("ZeRO 3", f"dp={n},zero=3", zero_3, plain),
        ("tp", f"tp={n},sp=0", tensor, plain),
        ("tp and sequence", f"tp={n},sp=1", sequence, plain),
        ("tp_y", f"tp_y={n}", inner, plain),
        ("pp", f"pp={n}", pipeline, plain),
        ("cp, ring", f"cp={n}", ring, plain),
        ("cp, ulysses", f"cp={n},ulysses={n}", ulysses, plain),
        ("ep", f"dp={n},ep={n}", experts, moe),
    ]
    if n % 4 == 0:
        table.append(("dp and tp", f"dp=2,tp={n // 2},sp=0", data_and_tensor, plain))
        table.append(("3-D, x y", f"tp=2,tp_y={n // 2},sp=0", grid, plain))
    if n == 8:
        table.append(("3-D, x y z", "tp=2,tp_y=2,tp_z=2,sp=0", grid, plain))
    return table


def measure(m: Model, text: str, formula: Formula, world: Intracomm | None) -> tuple[Sent, Sent]:
    """(measured, by the formula): what this rank sends in the second of two steps, in which nothing is new."""
    config = with_layout(m.config(), text).resolved(ranks=1 if world is None else world.size, vocabulary=m.vocabulary)
    with mesh_for(config, world) as mesh:
        engine, source = Engine(config, mesh), source_of(config)
        engine.step(0, *source(0, engine.share))
        mesh.forget_traffic()
        engine.step(1, *source(1, engine.share))
        measured: Sent = Counter(
            {(axes, op): sent for axes, traffic in mesh.traffic().items() for op, (_, sent) in traffic.items()}
        )
        return +measured, formula(m, config.layout, mesh) + scalars(m, config.layout, mesh)


def main() -> None:
    """Print the table; an error if anything differs on any rank."""
    from hpcmp.comm.detect import start_mpi

    world = start_mpi().COMM_WORLD
    lines, wrong = [], []
    for name, text, formula, m in rows(world.size):
        measured, expected = measure(m, text, formula, world)
        if measured != expected:
            wrong.append(f"rank {world.rank}, {text}: {dict(measured)}, not {dict(expected)}")
        totals = [sum(c[key] for key in c if key[0] != Mesh.axes) for c in (expected, measured)]
        most = max(world.allgather(totals), key=lambda pair: pair[1])
        lines.append(f"| {name} | `{text}` | {formula.__doc__} | {most[0]:,} | {most[1]:,} |")
    if wrong := [line for found in world.allgather(wrong) for line in found]:
        raise SystemExit("\n".join(wrong))
    if world.rank == 0:
        print("| parallelism | layout | bytes that a rank sends in a step | by the formula | measured |")
        print("\n".join(["|---|---|---|---|---|", *lines]))


if __name__ == "__main__":
    main()
