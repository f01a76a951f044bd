"""Layouts that cannot be are refused, with suggestions every one of which can: tried on layouts drawn at random."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from hpcmp.comm.mesh import Mesh
from hpcmp.errors import InputError
from hpcmp.training.config import Config, Layout, Model, parse_layout

SIZE = st.integers(1, 6)
LAYOUTS = st.builds(
    Layout,
    dp=st.none() | SIZE,
    pp=SIZE,
    cp=st.integers(1, 4),
    tp=SIZE,
    tp_y=st.integers(1, 3),
    tp_z=st.integers(1, 3),
    ep=SIZE,
    ulysses=st.integers(1, 4),
    zero=st.sampled_from([0, 3]),
    zero_group=st.none() | SIZE,
).filter(lambda layout: (layout.zero_group or layout.tp_z) % layout.tp_z == 0)


class Ranks:
    """As much of a communicator as a mesh looks at before it refuses."""

    def __init__(self, size: int) -> None:
        self.size = size


def refusal(layout: Layout, ranks: int) -> str:
    try:
        fits = layout.resolved(ranks)
    except InputError as error:
        return str(error)
    assert fits.ranks == ranks
    return ""


@seed(20)
@settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(LAYOUTS, st.integers(1, 64))
def test_what_is_suggested_fits(layout: Layout, ranks: int) -> None:
    message = refusal(layout, ranks)
    if not message:
        return
    problem, _, rest = message.partition("; ")
    if " ranks" in problem:  # the product: whole layouts are suggested
        for text in rest.removesuffix(" would fit").split(" or "):
            assert refusal(parse_layout(text, layout), ranks) == "", f"{message}: {text}"
            changes = dict(item.split("=") for item in text.split(","))  # in the file, where the other keys remain
            kept = dataclasses.replace(layout, **{key: int(n) for key, n in changes.items()})
            assert refusal(kept, ranks) == "", f"{message}: {text}"
        return
    fixed = layout
    for part in re.findall(r"layout\.(\w+) = \d+[^;]*?; (?:for layout\.zero_group )?([\d, or]+) would fit", message):
        key, numbers = part
        key = "zero_group" if "neither" in message and key == "ep" else key
        for n in re.findall(r"\d+", numbers):
            tried = dataclasses.replace(fixed, **{key: int(n)})
            told = refusal(tried, ranks)
            assert f"layout.{key} = {n} " not in told, f"{message}: {n}: {told}"
        fixed = tried
    assert refusal(fixed, ranks) == "", message


@seed(20)
@settings(max_examples=200, deadline=None, database=None)
@given(LAYOUTS, st.integers(1, 24))
def test_a_mesh_refuses_what_the_configuration_refuses(layout: Layout, ranks: int) -> None:
    """As the last line of defence: where the configuration lets a layout pass, so does the mesh."""
    try:
        fits = layout.resolved(ranks)
    except InputError:
        return
    axes = {axis: getattr(fits, axis) for axis in (*Mesh.axes, "ulysses", "ep", "shard")}
    for wrong in ({"dp": axes["dp"] + 1}, {"ulysses": axes["cp"] + 1}, {"ep": fits.data + 1}, {"shard": fits.data + 1}):
        with pytest.raises(InputError, match="layout"):
            Mesh(Ranks(ranks), **axes | wrong)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):  # it goes on, to the first thing that it does with the ranks
        Mesh(Ranks(ranks), **axes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layout", "ranks", "message"),
    [
        (Layout(tp=4, cp=2), 12, "layout.tp x layout.cp x layout.pp = 8 does not divide the 12 ranks; tp=3,pp=1,cp=2"),
        (Layout(tp=2, ep=3), 8, "layout.ep = 3 does not divide layout.dp = 4; 1, 2 or 4 would fit"),
        (Layout(cp=4, ulysses=3), None, "layout.ulysses = 3 does not divide layout.cp = 4; 1, 2 or 4 would fit"),
        (Layout(dp=4, zero=1, zero_group=3), None, "layout.zero_group = 3 does not divide layout.dp = 4; 1, 2 or 4"),
        (Layout(pp=3, tp=2, ep=2, schedule="gpipe"), 8, "tp=2,pp=4,ep=1 or tp=2,pp=2,ep=2 or tp=1,pp=4,ep=2 would fit"),
        (Layout(dp=3, tp_z=2), 4, "dp=2,tp=1,pp=1,tp_z=2"),
    ],
)
def test_the_line(layout: Layout, ranks: int | None, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        layout.resolved(ranks)


def test_it_is_found_when_the_file_is_read() -> None:
    with pytest.raises(InputError, match="layout.ep = 3"):
        Config(model=Model(experts=8), layout=Layout(dp=4, ep=3)).resolved()
    Config(model=Model(experts=8), layout=Layout(ep=3)).resolved()  # the number of ranks is not known yet


def test_stages_given_by_numbers_restrict_what_is_suggested() -> None:
    message = refusal(Layout(tp=3, pp=2, stages="2+2", schedule="gpipe"), 4)
    assert message.endswith("; tp=2,pp=2 or tp=1,pp=2 would fit")
    assert "nothing with this layout.schedule" in refusal(Layout(pp=2, stages="2+2", schedule="gpipe"), 3)
