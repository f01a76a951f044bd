"""The configuration: what a file may say, what is made of it, and how errors name what is wrong."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from hpcmp.errors import InputError
from hpcmp.training.config import (
    SECTIONS,
    Config,
    Data,
    Layout,
    Model,
    Optimizer,
    Run,
    Train,
    check_layout,
    load_config,
    parse_layout,
    reference,
    with_layout,
)
from hpcmp.training.layout import short

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def write(tmp_path):
    """write(text) -> the path of a configuration file."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "gpt.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refused(call, *args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_file_gives_the_values_it_names_and_defaults_for_the_rest(write):
    config = load_config(write('[model]\nlayers = 3\nstyle = "llama"\n[optimizer]\nclip = "none"\nlearning_rate = 1\n'))
    assert (config.model.layers, config.model.style, config.model.hidden) == (3, "llama", 128)
    assert config.optimizer.clip is None
    assert config.optimizer.learning_rate == 1.0 and isinstance(config.optimizer.learning_rate, float)
    assert config.run.directory == "runs/gpt"
    assert dataclasses.replace(config, run=Config().run, model=Model(), optimizer=Optimizer()) == Config()


def test_an_empty_file_is_the_default_configuration(write):
    assert load_config(write("")) == Config(run=Run(directory="runs/gpt"))


def test_derived_values_of_both_styles():
    gpt = Config(model=Model(hidden=96, heads=3)).resolved().model
    assert (gpt.kv_heads, gpt.head_size, gpt.ffn, gpt.expert_ffn, gpt.tied, gpt.bias) == (3, 32, 384, 384, True, True)
    llama = Config(model=Model(style="llama", hidden=96, heads=4, kv_heads=2)).resolved(vocabulary=300).model
    assert (llama.kv_heads, llama.head_size, llama.ffn, llama.tied, llama.bias) == (2, 24, 256, False, False)
    assert llama.vocabulary == 300 and gpt.vocabulary is None


def test_derived_values_do_not_replace_given_ones():
    given = Model(kv_heads=1, head_size=50, ffn=7, expert_ffn=5, tied=False, bias=False, vocabulary=10)
    assert Config(model=given).resolved(vocabulary=99).model == given


def test_derived_values_across_sections():
    config = Config(train=Train(steps=20), layout=Layout(tp=2)).resolved(ranks=6)
    assert (config.optimizer.decay_steps, config.optimizer.warmup) == (20, 10)
    assert (config.layout.dp, config.layout.sequence_parallel) == (3, True)
    assert config.checkpoint.directory == "runs/unnamed/checkpoints"
    assert Config(train=Train(steps=1000)).resolved().optimizer.warmup == 50
    assert Config().resolved().layout.sequence_parallel is False


def test_resolving_twice_is_resolving_once():
    once = Config(model=Model(style="llama")).resolved(ranks=4, vocabulary=256)
    assert once.resolved(ranks=4, vocabulary=256) == once
    assert all(getattr(once.model, f.name) is not None for f in dataclasses.fields(Model) if f.metadata["rule"])


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=7", 7),
        ("train.device=cuda", "cuda"),
        ("optimizer.learning_rate=3e-4", 3e-4),
        ("optimizer.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("optimizer.clip=none", None),
        ("checkpoint.resume=false", False),
        ("data.path=books.h5", "books.h5"),
        ("data.path='a b.h5'", "a b.h5"),
        ("data.path=2024", "2024"),
        ("run.directory=2024-01-01", "2024-01-01"),
        ("run.directory=a=b", "a=b"),
        ("data.path=1\nx = 2", "1\nx = 2"),
    ],
)
def test_an_override_comes_before_the_file(write, override, value):
    config = load_config(write("[train]\nsteps = 90\n"), [override])
    section, key = override.partition("=")[0].split(".")
    assert getattr(getattr(config, section), key) == value


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[model]\nhiden = 3", ["gpt.toml", "model.hiden", "did you mean model.hidden?"]),
        ("[modle]\nhidden = 3", ["gpt.toml", "[modle]", "did you mean [model]?"]),
        ("[train]\nlearning_rate = 3", ["train.learning_rate", "did you mean optimizer.learning_rate?"]),
        ("[train]\nxyzzy = 3", ["train.xyzzy", "there are steps, batch"]),
        ("layers = 3", ["layers", "outside a section", "model.layers"]),
        ("model = 3", ["[model]", "found 3"]),
        ("[train]\nsteps = 1.0", ["train.steps", "an integer", "found 1.0"]),
        ("[train]\nsteps = true", ["train.steps", "an integer", "found true"]),
        ('[train]\nsteps = "ten"', ["train.steps", "an integer", 'found "ten"']),
        ("[train]\nsteps = [1]", ["train.steps", "an integer", "found [1]"]),
        ("[train]\nsteps = 2020-01-01", ["train.steps", "an integer", "found 2020-01-01"]),
        ("[train.steps]\na = 1", ["train.steps", "an integer", "found a table"]),
        ("[train]\nsteps = 0", ["train.steps", "at least 1", "found 0"]),
        ("[model]\nlayers = -1", ["model.layers", "at least 1", "found -1"]),
        ("[model]\ndropout = 1", ["model.dropout", "in [0, 1)", "found 1"]),
        ("[model]\ndropout = nan", ["model.dropout", "found nan"]),
        ("[optimizer]\nlearning_rate = inf", ["optimizer.learning_rate", "found inf"]),
        (f"[optimizer]\nlearning_rate = 1{'0' * 400}", ["optimizer.learning_rate", "above 0"]),
        ("[optimizer]\nclip = 0", ["optimizer.clip", "above 0", 'or "none"']),
        ("[optimizer]\nbetas = [0.9]", ["optimizer.betas", "2 numbers", "found [0.9]"]),
        ("[optimizer]\nbetas = [0.9, 1.0]", ["optimizer.betas", "in [0, 1)"]),
        ('[train]\ndtype = "float23"', ["train.dtype", '"float32", "float64"', 'found "float23"']),
        ("[model]\ntied = 1", ["model.tied", "true or false", "found 1"]),
        ('[train]\nbatch = "none"', ["train.batch", 'found "none"']),
        ("[data]\npath = 3", ["data.path", "text", "found 3"]),
        ("[model]\nhidden = 100\nheads = 3", ["gpt.toml", "model.head_size", "model.heads = 3", "model.hidden = 100"]),
        ("[model]\nheads = 4\nkv_heads = 3", ["model.kv_heads = 3", "model.heads = 4"]),
        ('[model]\nstyle = "llama"\nhead_size = 13', ["model.head_size = 13", "even"]),
        ("[optimizer]\nwarmup = 1001", ["optimizer.warmup = 1001", "1000"]),
        ("[train]\nmicrobatch = 9", ["train.microbatch = 9", "train.batch = 8"]),
        ("[checkpoint]\nevery = 4\nkeep_every = 6", ["checkpoint.keep_every = 6", "checkpoint.every = 4"]),
        ("[checkpoint]\nkeep_every = 6", ["checkpoint.keep_every = 6", "checkpoint.every = none"]),
        ('[communication]\nbackend = "nccl"', ["communication.backend", "train.device"]),
        ("[model]\nlayers = \n", ["gpt.toml, line 2"]),
        ("[model]\nlayers = 2\nlayers = 3\n", ["gpt.toml, line 3"]),
        ("[model]\nlayers = [", ["gpt.toml, at its end"]),
        (b'x = "\xff"', ["gpt.toml", "UTF-8"]),
    ],
)
def test_an_error_names_the_file_the_key_and_what_is_right(write, text, parts):
    message = refused(load_config, write(text))
    assert [part for part in ["gpt.toml", *parts] if part not in message] == []


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.steps", ["'train.steps'", "section.key=value"]),
        ("steps=3", ["'steps=3'", "section.key=value"]),
        ("train.steps=ten", ["command line", "train.steps", 'found "ten"']),
        ("train.stepz=3", ["command line", "did you mean train.steps?"]),
        ("trian.steps=3", ["command line", "did you mean [train]?"]),
        ("model.heads=5", ["gpt.toml", "command line", "model.head_size"]),
    ],
)
def test_an_error_of_an_override_names_the_command_line(write, override, parts):
    message = refused(load_config, write(""), [override])
    assert [part for part in parts if part not in message] == []


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    assert str(tmp_path / "none.toml") in refused(load_config, tmp_path / "none.toml")
    assert "directory" in refused(load_config, tmp_path)


FIELDS = [(section, field) for section in SECTIONS.values() for field in dataclasses.fields(section)]


@pytest.mark.parametrize(("section", "field"), FIELDS, ids=lambda x: getattr(x, "__name__", getattr(x, "name", "")))
def test_the_range_of_every_key_is_enforced(section, field):
    assert field.metadata["doc"]
    span = field.metadata["span"]
    if not span:
        return
    pair = isinstance(field.default, tuple)
    for bound, closed in zip(map(float, span[1:-1].split(",")), (span[0] == "[", span[-1] == "]"), strict=True):
        if math.isinf(bound):
            continue
        value = int(bound)
        if closed:
            section(**{field.name: (value, value) if pair else value})
            value += -1 if bound == float(span[1:-1].split(",")[0]) else 1
        message = refused(section, **{field.name: (value, value) if pair else value})
        assert f"{section.__name__.lower()}.{field.name}" in message


def sample() -> Config:
    return Config(
        model=Model(style="llama", hidden=96, kv_heads=2),
        data=Data(path='a "quoted" \\ path\n\x7f\x01é'),
        optimizer=Optimizer(clip=None, learning_rate=1 / 3, epsilon=1e-30, betas=(0.1, 2 / 3)),
        train=Train(minutes=0.1, dtype="float64"),
    )


@pytest.mark.parametrize("config", [Config(), sample(), sample().resolved(ranks=4, vocabulary=7)])
def test_json_and_toml_give_back_the_same_configuration(config, tmp_path):
    as_json = json.loads(json.dumps(config.to_dict()))
    assert as_json == config.to_dict()
    assert Config.from_dict(as_json) == config
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    read = load_config(path)
    if config.run.directory is None:
        read = dataclasses.replace(read, run=config.run)
    assert read == config


def test_a_stored_configuration_with_an_unknown_key_is_refused():
    assert "model.layerz" in refused(Config.from_dict, {"model": {"layerz": 3}})


def test_numpy_numbers_and_paths_are_taken_as_python_values(tmp_path):
    import numpy as np

    numbers: dict[str, Any] = {"layers": np.int64(3), "dropout": np.float32(0.5)}
    assert [type(getattr(Model(**numbers), key)) for key in numbers] == [int, float]
    folder: Any = tmp_path
    assert Data(path=folder).path == str(tmp_path)
    assert "model.layers" in refused(Model, layers=np.True_)


def test_a_layout_that_fits_gets_its_replicas():
    assert check_layout(Layout(tp=2, pp=2), 8).dp == 2
    assert check_layout(Layout(dp=3, tp=2), 6) == Layout(dp=3, tp=2)
    assert Layout(tp=2, pp=3).ranks == 6 and Layout(tp=2, pp=3, dp=2).ranks == 12


def test_a_layout_that_does_not_fit_is_told_what_would():
    message = refused(check_layout, Layout(tp=3, pp=2), 4)
    assert message.startswith("layout.tp x layout.pp = 6 does not divide the 4 ranks; tp=2,pp=2")
    message = refused(check_layout, Layout(dp=2, tp=2), 3)
    assert "= 4, and there are 3 ranks" in message and "dp=1,tp=3,pp=1" in message
    assert "tp=1,pp=1" in refused(check_layout, Layout(tp=2), 1)


@pytest.mark.parametrize("ranks", range(1, 25))
def test_every_layout_that_is_suggested_fits(ranks):
    replicas: tuple[Any, ...] = (None, 1, 5)
    for tp in range(1, 7):
        for pp in range(1, 7):
            for dp in replicas:
                try:
                    assert check_layout(Layout(dp=dp, tp=tp, pp=pp), ranks).ranks == ranks
                except InputError as error:
                    suggested = str(error).partition("; ")[2].removesuffix(" would fit").split(" or ")
                    assert suggested != [""]
                    for text in suggested:
                        assert check_layout(parse_layout(text, Layout()), ranks).ranks == ranks


def test_suggestions_for_many_ranks_are_quick():
    assert "tp=8,pp=1" in refused(check_layout, Layout(tp=7), 2**17)


def test_the_short_form_of_a_layout():
    base = Layout(dp=4, pp=3, tp=8, ep=4, ulysses=2, recompute="full", zero=1, bucket_mb=1.0)
    wanted = Layout(pp=2, tp=2, sequence_parallel=True, schedule="zb-h1", recompute="full", zero=1, bucket_mb=1.0)
    assert parse_layout("tp=2,pp=2,sp=1,schedule=zb-h1,micro=3", base) == wanted
    assert parse_layout("dp=2, recompute=none", base) == Layout(dp=2, zero=1, bucket_mb=1.0)


KEYS = {
    "dp=8,pp=2,cp=4,tp=3,tp_y=2,tp_z=5,ep=4,ulysses=2,sp=0,schedule=interleaved,virtual=2,stages=3+2+2+1": {},
    "dp=2,zero=3,zero_group=2,recompute=attention,recompute_every=2,offload=both": {"bucket_mb": 1.0},
    "dp=1,pp=2,tp=2,sp=1,schedule=file:a/b.txt": {},
}


@pytest.mark.parametrize("text", KEYS)
def test_every_key_of_the_short_form_is_read_and_written(text):
    layout = parse_layout(text, Layout(**KEYS[text]))
    assert parse_layout(short(layout), Layout(**KEYS[text])) == layout
    for item in text.split(","):
        key, _, value = item.partition("=")
        found = getattr(layout, {"sp": "sequence_parallel"}.get(key, key))
        assert str(int(found) if isinstance(found, bool) else found) == value


def test_every_key_of_a_layout_but_bucket_mb_is_in_the_short_form():
    keys = {item.partition("=")[0] for text in KEYS for item in text.split(",")} - {"sp"} | {"sequence_parallel"}
    assert keys == {field.name for field in dataclasses.fields(Layout)} - {"bucket_mb"}


def test_the_short_form_with_a_microbatch():
    config = with_layout(Config(), "tp=2,micro=3")
    assert (config.train.microbatch, config.layout) == (3, Layout(tp=2))
    assert with_layout(Config(), "tp=2").train == Train()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("tq=2", "did you mean tp?"),
        ("tp=0", "layout.tp"),
        ("tp", "layout.tp"),
        ("tp=-1", "layout.tp"),
        ("sp=2", "layout.sequence_parallel"),
        ("micro=0", "micro"),
        ("micro=x", "micro"),
        ("recompute=some", '"full"'),
        ("zero=4", "[0, 3]"),
        ("cp=0", "layout.cp"),
        ("", "unknown key"),
        ("tp=2,,pp=2", "unknown key"),
    ],
)
def test_an_error_in_the_short_form_names_the_flag(text, part):
    message = refused(parse_layout, text, Layout())
    assert message.startswith(f"--layout {text}: ") and part in message


def test_the_page_holds_the_table_of_every_section():
    assert (DOCS / "configuration.md").read_text(encoding="utf-8").endswith("-->\n\n" + reference().rstrip() + "\n"), (
        "docs/configuration.md is out of date: replace what follows its comment by the output of the command in it"
    )
