"""Times of layers: measured in spite of noise, interpolated, kept on disk."""

from __future__ import annotations

import json
import logging
import random
from types import SimpleNamespace

import pytest
import torch

from optimum_rmtkd.surgery import layertimes, timecache
from optimum_rmtkd.surgery.layertimes import Kind, LayerTimes, Surface, grid, timed

from . import zoo


LINEAR = Kind("linear", (32, 1))


class Machine:
    """A clock that layers of a known law move on, and that other work disturbs now and then."""

    def __init__(self, law, disturbed=0.3):
        self.now, self.law, self.disturbed, self.draw = 0.0, law, disturbed, random.Random(0)
        self.time = SimpleNamespace(perf_counter=lambda: self.now)

    def work(self, pool, fixed, widths):
        def run():
            self.now += self.law(*widths) * (1 + 3 * self.draw.random() * (self.draw.random() < self.disturbed))

        return run


def law(inputs, outputs):
    return 2e-6 + 1e-9 * inputs + 2e-11 * inputs * outputs


@pytest.fixture
def machine(monkeypatch):
    made = Machine(law)
    monkeypatch.setattr(layertimes, "time", made.time)
    monkeypatch.setitem(layertimes._WORK, "linear", made.work)
    monkeypatch.setattr(layertimes, "MOST_CALLS", 1)
    return made


def test_a_layer_is_as_quick_as_its_quickest_pass(machine):
    points = [(LINEAR, (a, b)) for a in (16, 64, 256) for b in (8, 32, 512)]
    seconds, spread = timed(points, "cpu", torch.float32)
    assert seconds == pytest.approx([law(*widths) for _, widths in points], rel=1e-9)
    assert 0 <= spread < 1


def test_between_the_points_a_bilinear_law_is_met(machine):
    times = LayerTimes("cpu", torch.float32)
    axes = (grid(8, 300), grid(24, 1000))
    assert times.measure([(LINEAR, (a, b)) for a in axes[0] for b in axes[1]]) == len(axes[0]) * len(axes[1])
    surface = times.surface(LINEAR, axes)
    for widths in [(8, 24), (300, 1000), (17, 333), (211, 999), (120, 40), (4, 12), (400, 1200)]:
        assert surface(*widths) == pytest.approx(law(*widths), rel=1e-6)
    assert times.measure([(LINEAR, (8, 24))]) == 0  # nothing is timed twice


def test_no_layer_is_quicker_for_being_wider():
    surface = Surface([(8, 16, 32)], [3.0, 5.0, 4.0])
    assert [surface(width) for width in (8, 16, 24, 32)] == [3.0, 4.0, 4.0, 4.0]
    both = Surface([(1, 2), (1, 2)], [4.0, 2.0, 1.0, 3.0])
    assert [both(a, b) for a in (1, 2) for b in (1, 2)] == [1.0, 2.0, 1.0, 3.0]
    assert Surface([(7,)], [2.5])(3) == 2.5


def test_the_grid_is_fine_enough_and_small():
    assert grid(8, 384) == (8, 32, 48, 64, 96, 128, 192, 256, 384)
    assert grid(5, 5) == (5,) and grid(1, 3) == (1, 3)
    widths = grid(8, 3072)
    assert widths[0] == 8 and widths[-1] == 3072 and len(widths) < 12
    assert all(later <= 1.51 * earlier for earlier, later in zip(widths[1:], widths[2:], strict=False))


@pytest.mark.parametrize("name", ["bert", "electra-projected", "vit", "resnet-basic", "resnet-bottleneck"])
@pytest.mark.parametrize("form", ["absorbed", "factored"])
def test_every_kind_of_layer_of_a_model_runs(name, form, monkeypatch):
    """On the true clock, once: the work is there, and takes time."""
    from optimum_rmtkd import RMTKDConfig
    from optimum_rmtkd.surgery.checks import anatomy_of
    from optimum_rmtkd.surgery.latency import _Terms

    monkeypatch.setattr(layertimes, "MOST_CALLS", 1)
    monkeypatch.setattr(layertimes, "PASSES", 1)
    task = "ForImageClassification" if zoo.is_image(name) else "ForSequenceClassification"
    model, config = zoo.make(name, task), RMTKDConfig(form=form)
    anatomy = anatomy_of(model, config)
    terms = _Terms(model, anatomy, zoo.batches(name, count=1)[0], list(anatomy.sites.values()), config)
    points = terms.points()
    times = LayerTimes("cpu", torch.float32)
    assert times.measure(points) == len(set(points)) > 5
    terms.read(times)
    bare = terms.sum(1.0, 0.0)
    floors = {site.couple: max(1, site.group_width // 4) for site in anatomy.sites.values() if site.kind != "pooled"}
    assert bare(floors) > 0 and bare({}) > 0
    if form == "absorbed":  # two thin factors may take longer than a layer of so few features
        assert bare(floors) < bare({})
    kinds = {kind.name for kind, _ in points}
    norm = {"batch_norm"} if form == "absorbed" else set()
    assert {"conv"} | norm <= kinds if "resnet" in name else {"linear"} <= kinds


# On disk


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(timecache, "cache_folder", lambda: tmp_path / "latency")
    return timecache.cache_file("cpu", 1, torch.float32)


TIMES = {"linear 32x1": {"8x16": 1e-5}}


def test_times_are_kept_beside_those_of_others(cache):
    file, about = cache
    assert timecache.read_times(file, about) == {}
    timecache.write_times(file, about, TIMES)
    timecache.write_times(file, about, {"linear 32x1": {"8x32": 2e-5}, "layer_norm 32": {"8": 1e-6}})
    assert timecache.read_times(file, about) == {
        "linear 32x1": {"8x16": 1e-5, "8x32": 2e-5},
        "layer_norm 32": {"8": 1e-6},
    }
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_each_setting_has_a_file_of_its_own(cache):
    files = {timecache.cache_file("cpu", n, dtype)[0] for n in (1, 2) for dtype in (torch.float32, torch.bfloat16)}
    assert len(files) == 4 and cache[0] in files


def changed(**values):
    return lambda about: json.dumps({"version": 1, "about": about, "times": TIMES} | values)


DAMAGED = {
    "half written": lambda about: changed()(about)[:-30],
    "empty": lambda about: "",
    "no JSON": lambda about: "times",
    "a list": lambda about: "[1]",
    "another device": changed(about={"device": "cuda"}),
    "another version": changed(version=2),
    "no times": changed(times=None),
    "a time of no number": changed(times={"linear 32x1": {"8x16": "quick"}}),
    "a time below zero": changed(times={"linear 32x1": {"8x16": -1.0}}),
    "a kind of no mapping": changed(times={"linear 32x1": 3}),
    "not text": lambda about: b"\xff\xfe",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_or_foreign_file_is_passed_over_with_a_line(cache, damage, caplog):
    file, about = cache
    file.parent.mkdir(parents=True)
    content = DAMAGED[damage](about)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with caplog.at_level(logging.WARNING, logger="optimum_rmtkd"):
        assert timecache.read_times(file, about) == {}
    assert caplog.text.count("are passed over") == 1 and str(file) in caplog.text
    timecache.write_times(file, about, TIMES)
    caplog.clear()
    assert timecache.read_times(file, about) == TIMES and not caplog.records


def test_a_folder_that_cannot_be_written_to_stops_nothing(cache, caplog):
    file, about = cache
    file.parent.write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING, logger="optimum_rmtkd"):
        timecache.write_times(file, about, TIMES)
    assert "are not kept for the next run" in caplog.text
