"""Every pipeline schedule gives the serial model's numbers, whatever the counts of microbatches, ranks and blocks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hpcmp.errors import InputError
from hpcmp.parallel.schedules import SCHEDULES, make_schedule, write_schedule
from tests.layouts import assert_serial, engine, small, spread

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

#: As ``--layout`` takes them.
ALL = [name for name in SCHEDULES if name != "interleaved"] + ["interleaved,virtual=2", "interleaved,virtual=3"]

#: The rest of the layout by the number of ranks: pipelines of 1 to 4 ranks, and what stands beside them.
REST = {1: "pp=1", 2: "pp=2", 3: "pp=3", 4: "pp=4", 8: "pp=2,dp=2,tp=2,sp=1"}


@pytest.mark.mpi
@pytest.mark.timeout(120)
@pytest.mark.parametrize("tied", [True, False])
def test_every_schedule(world: Intracomm, tied: bool) -> None:
    """Five microbatches; with dropout, whose masks tell them apart."""
    config = small(layers=5, batch=5 * (1 + (world.size == 8)), dropout=0.1, tied=tied)
    names = ALL if world.size <= 4 else ALL[tied::2]  # 8 ranks take turns
    assert_serial([spread(config, f"{REST[world.size]},micro=1,schedule={name}") for name in names], world)


@pytest.mark.mpi
@pytest.mark.timeout(120)
@pytest.mark.parametrize("batch", [1, 3, 11])
def test_counts_of_microbatches(world: Intracomm, batch: int) -> None:
    """One, three, and more than any schedule needs to fill up."""
    config = small(style="llama", layers=3, batch=batch, sequence=3, dropout=0.1, tied=True)
    pp = min(world.size, 4)
    assert_serial([spread(config, f"pp={pp},micro=1,schedule={name}") for name in ALL], world)


@pytest.mark.mpi
@pytest.mark.parametrize("tied", [True, False])
def test_uneven_stages(world: Intracomm, tied: bool) -> None:
    """Stages without a block, at the ends and in the middle, and one with nearly all."""
    config = small(layers=5, dropout=0.1, tied=tied)
    pp = min(world.size, 4)

    def sizes(stages: int, most: int) -> str:
        return "+".join(str(4 if i == most else int(i == (most + 1) % stages)) for i in range(stages))

    made = []
    for name, chunks in [("1f1b", 1), ("zb-h1", 1), ("zb-v", 2), ("interleaved,virtual=3", 3)]:
        for most in {0, pp * chunks // 2}:
            stages = sizes(pp * chunks, most) if pp * chunks > 1 else "5"
            made.append(spread(config, f"pp={pp},micro=2,schedule={name},stages={stages}"))
    assert_serial(made, world)


@pytest.mark.mpi
def test_a_schedule_from_a_file(world: Intracomm, mpi_tmp_path: Path) -> None:
    """One that was exported, and one written by hand, whose backwards go from the last microbatch to the first."""
    pp, path = min(world.size, 4), mpi_tmp_path / "plan.txt"
    written = mpi_tmp_path / "mine.txt"
    if world.rank == 0:
        write_schedule(make_schedule("interleaved", 2), pp, 6, path)
        last_first = "F0 F1 F2 F3 F4 F5 B5 B4 B3 B2 B1 B0"
        written.write_text("".join(f"{rank}: {last_first}\n" for rank in range(pp)))
    world.Barrier()
    config = small(layers=5, batch=5, dropout=0.1, tied=True)
    assert_serial([spread(config, f"pp={pp},micro=1,schedule=file:{file}") for file in (path, written)], world)


def test_a_file_for_fewer_microbatches_is_refused_before_training(tmp_path: Path) -> None:
    write_schedule(make_schedule("1f1b"), 1, 4, tmp_path / "plan")
    config = small(batch=5, microbatch=1, schedule=f"file:{tmp_path / 'plan'}")
    with pytest.raises(InputError, match="plan is for up to 4 microbatches, and there are 5"), engine(config):
        pass
    with pytest.raises(InputError, match="layout.schedule: .*plan is for 1 pipeline ranks, and there are 2"):
        small(pp=2, schedule=f"file:{tmp_path / 'plan'}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "1f1bb"}, "layout.schedule: unknown schedule '1f1bb'; there are gpipe, 1f1b"),
        ({"schedule": "file:gone"}, "layout.schedule: schedule gone: cannot be read: No such file"),
        ({"virtual": 2}, "layout.schedule: schedule 1f1b has 1 virtual stage.* a rank, not 2"),
        ({"schedule": "zb-v", "virtual": 3}, "layout.schedule: schedule zb-v has 2 virtual stage.* a rank, not 3"),
        ({"stages": "1+x"}, 'layout.stages = "1.x": expected even, measured, or numbers such as "3.2.2"'),
        ({"stages": ""}, 'layout.stages = "": expected even'),
        ({"stages": "1+1+1"}, 'layout.stages = "1.1.1" .* there are 2 virtual stages and model.layers = 5'),
        (
            {"stages": "1+3"},
            'layout.stages = "1.3" .* 4 blocks in all; there are 2 virtual stages and model.layers = 5',
        ),
        ({"stages": "3+2", "schedule": "zb-v"}, 'layout.stages = "3.2" .* there are 4 virtual stages'),
    ],
)
def test_layouts_that_do_not_fit(values: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small(**({"layers": 5, "pp": 2} | values))
