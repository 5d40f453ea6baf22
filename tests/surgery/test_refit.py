"""The refit against one that runs whole networks for every layer; what it computes, and what it holds."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optimum_rmtkd import RMTKDConfig, narrow
from optimum_rmtkd.batches import padding_mask, run
from optimum_rmtkd.surgery import reduce, surgeon
from optimum_rmtkd.surgery.calibration import observed
from optimum_rmtkd.surgery.leastsquares import RIDGES, LeastSquares, NormFit, least_squares_update, norm_fit
from optimum_rmtkd.surgery.refit import _entry, _project, _rows, _sums_of, _touched, refit
from optimum_rmtkd.surgery.replay import Progress, Replay, Scope
from optimum_rmtkd.surgery.sites import Point, Unit, get_module
from optimum_rmtkd.surgery.surgeon import Surgeon
from optimum_rmtkd.surgery.units import own_units

from . import zoo


RECIPE = RMTKDConfig(target_reduction=0.4, round_to=4, min_width=4, calibration_samples=48, refit=False)
MODELS = [
    ("bert", "ForSequenceClassification"),
    ("distilbert", "ForTokenClassification"),
    ("vit", "ForImageClassification"),
    ("resnet-bottleneck", "ForImageClassification"),
]
MORE = [
    ("roberta", "ForQuestionAnswering"),
    ("electra-projected", "ForTokenClassification"),
    ("deit", "ForImageClassification"),
    ("resnet-basic", "Model"),
    ("bert", "ForMaskedLM"),
]


def prepared(name, task):
    """(surgeon, cuts, a student that is not refitted yet)"""
    found = Surgeon(zoo.make(name, task), zoo.batches(name), RECIPE, progress=False)
    couples = found.plan().couples
    return found, found._cuts(found.anatomy, couples, False), found.operate(couples)[0]


# The oracle


def activations(model, batches, points):
    """{point: activation of each batch}, from a whole pass over each."""
    seen = {point: [] for point in points}
    with observed(model, points, lambda point, x: seen[point].append(x.detach().clone())), torch.no_grad():
        for batch in batches:
            run(model, batch)
    return seen


def rows(model, batches, point):
    """Rows of all batches at a point."""
    found = activations(model, batches, [point])[point]
    return torch.cat([_rows(x, (padding_mask(batch), None)) for x, batch in zip(found, batches, strict=True)]).double()


def with_statistics(norm, channels):
    """The same function with the mean and variance of what it reads, (channels, positions)."""
    slope = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - slope * norm.running_mean.double()
    norm.running_mean.copy_(channels.mean(1))
    norm.running_var.copy_(channels.var(1))
    norm.weight.copy_(slope * (channels.var(1) + norm.eps).sqrt())
    norm.bias.copy_(shift + slope * channels.mean(1))


def refit_one_by_one(student, teacher, anatomy, cuts, batches, ridge):
    """Every unit by itself, in fp64, from whole passes of both networks over all data, every row held."""
    scope = Scope(student, None, [])
    for unit in anatomy.units:
        if not _touched(unit, scope, cuts):
            continue
        module, entrance = get_module(student, unit.path), Point(unit.path, "input")
        wanted = rows(teacher, batches, Point(unit.path)) + (rows(teacher, batches, unit.skip) if unit.skip else 0.0)
        wanted = _project(wanted, cuts.of(unit.writes, unit.path))
        wanted = wanted - (rows(student, batches, unit.skip) if unit.skip else 0.0)
        entries = activations(student, batches, [entrance])[entrance]
        with torch.no_grad():
            x = [_entry(module, x, (padding_mask(batch), None)) for x, batch in zip(entries, batches, strict=True)]
            x = torch.cat(x).double()
            if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
                u, t = x - x.mean(0), wanted - wanted.mean(0)
                slope = (u * t).sum(0) / u.square().sum(0)
                module.weight.copy_(slope)
                module.bias.copy_(wanted.mean(0) - slope * x.mean(0))
                if isinstance(module, nn.BatchNorm2d):
                    with_statistics(module, torch.cat(entries).double().movedim(1, 0).flatten(1))
                continue
            last = module.up if hasattr(module, "down") else module
            bias = None if last.bias is None else last.bias.double()
            residual = wanted - F.linear(x, last.weight.double().flatten(1), bias)
            centre_x, centre_r = (x.mean(0), residual.mean(0)) if bias is not None else (0.0, 0.0)
            centred = x - centre_x
            selected = unit.reads in own_units(student, anatomy)
            area = last.kernel_size[0] * last.kernel_size[1] if isinstance(last, nn.Conv2d) else x.shape[1]
            area = 1 if selected and not isinstance(last, nn.Conv2d) else area
            mean = centred.square().sum(0).reshape(-1, area).mean(1).repeat_interleave(area)
            penalty = torch.diag(ridge * torch.where(mean > 0, mean, centred.square().sum(0).mean()))
            update = torch.linalg.solve(centred.T @ centred + penalty, centred.T @ (residual - centre_r)).T
            last.weight.copy_(last.weight.double() + update.reshape(last.weight.shape))
            if bias is not None:
                last.bias.copy_(bias + centre_r - update @ centre_x)


@pytest.mark.parametrize("name, task", MODELS + [pytest.param(*more, marks=pytest.mark.slow) for more in MORE])
def test_the_refit_is_that_of_one_layer_after_the_other(name, task):
    found, cuts, student = prepared(name, task)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    refit(student, found.teacher, found.anatomy, cuts, found.batches, 1e-3, progress=False)
    fitted = {key: value.clone() for key, value in student.state_dict().items()}
    student.load_state_dict(before)
    refit_one_by_one(student, found.teacher, found.anatomy, cuts, found.batches, 1e-3)
    moved = 0
    for key, expected in student.state_dict().items():
        if not expected.is_floating_point():
            continue
        moved += (expected - before[key]).norm() > 1e-2 * before[key].norm()
        assert (fitted[key] - expected).norm() <= 1e-3 * expected.norm().clamp_min(1e-3), key
    assert moved > 6
    outputs = zoo.outputs(student, found.batches[0])
    student.load_state_dict(fitted)
    assert (zoo.outputs(student, found.batches[0]) - outputs).norm() < 1e-3 * outputs.norm()


# Sums in place of rows


@pytest.mark.parametrize("intercept", [True, False])
def test_chunks_add_up_however_their_means_differ(intercept):
    x = torch.cat([torch.randn(40, 6) + 5 * i for i in range(4)])
    residual = x @ torch.randn(6, 3) + torch.randn(160, 3) + 2.0
    whole = least_squares_update([x], [residual], 1e-3, intercept)
    parts = least_squares_update(x.split(23), residual.split(23), 1e-3, intercept)
    for one, other in zip(whole, parts, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3)


def rows_of(count, noise, seed=0, wide=24, outputs=5):
    """x (count, wide) of uneven scales, and what a layer misses of them: linear in x, and noise."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, wide, generator=draw) * torch.logspace(0, -2, wide) + 1.0
    matrix = torch.randn(wide, outputs, generator=torch.Generator().manual_seed(99))
    return x, x @ matrix + noise * torch.randn(count, outputs, generator=draw)


@pytest.mark.parametrize("intercept", [True, False])
def test_the_ridge_is_the_one_under_which_two_halves_explain_each_other(intercept):
    x, r = (rows.double() for rows in rows_of(60, 0.5))
    chunks = list(zip(x.split(20), r.split(20), strict=True))
    halves = [
        [torch.cat(parts) for parts in zip(*(c(pair) for pair in chunks), strict=True)]
        for c in (lambda pair: [t[:10] for t in pair], lambda pair: [t[10:] for t in pair])
    ]

    def missed(ridge):  # from rows, in fp64
        total = 0.0
        for (a, b), (u, v) in (halves, halves[::-1]):
            of_a, of_b = (a.mean(0), b.mean(0)) if intercept else (0.0, 0.0)
            centred = a - of_a
            penalty = ridge * centred.square().sum(0).mean() * torch.eye(len(a.T), dtype=a.dtype)
            update = torch.linalg.solve(centred.T @ centred + penalty, centred.T @ (b - of_b)).T
            total += (v - of_b - (u - of_a) @ update.T).square().sum()
        return float(total)

    best = min(RIDGES, key=missed)
    assert RIDGES[0] < best < RIDGES[-1]
    found = least_squares_update(x.split(20), r.split(20), None, intercept)
    for one, other in zip(found, least_squares_update([x], [r], best / 2, intercept), strict=True):
        assert torch.allclose(one, other, atol=2e-3)


def test_a_chosen_ridge_is_small_for_what_is_exact_and_large_for_noise():
    def chosen(count, noise):
        fit = LeastSquares(None, True)
        x, r = rows_of(count, noise)
        fit.add(x, {"": r})
        return 2 * fit._chosen("", "test")

    assert chosen(2000, 0.0) == RIDGES[0]
    assert chosen(2000, 0.5) < chosen(60, 2.0)


def test_chunks_of_single_rows_fill_both_halves():
    x, r = rows_of(2000, 0.0)
    fit = LeastSquares(None, True)
    for row in range(len(x)):
        fit.add(x[row : row + 1], {"": r[row : row + 1]})
    assert [half.count for half in fit._halves] == [1000, 1000]
    assert 2 * fit._chosen("", "test") == RIDGES[0]


def test_a_chosen_ridge_predicts_other_rows_better_than_a_small_one():
    gained = []
    for seed in range(10):
        x, r = rows_of(60, 1.0, seed)
        others, theirs = rows_of(2000, 0.0, seed + 100)
        missed = []
        for ridge in (1e-4, None):
            update, shift = (t.float() for t in least_squares_update([x], [r], ridge, True))
            missed.append(float((theirs - others @ update.T - shift).square().mean()))
        gained.append(missed[1] < missed[0])
    assert sum(gained) >= 9


def test_nothing_to_hold_out_is_fitted_with_care():
    x, r = torch.randn(1, 4), torch.randn(1, 2)
    update, shift = least_squares_update([x], [r], None, True)
    assert torch.equal(update, torch.zeros(2, 4, dtype=torch.float64)) and torch.allclose(shift, r[0].double())


def test_a_layer_that_misses_nothing_stays_under_any_ridge():
    x = torch.randn(40, 4)
    update, shift = least_squares_update([x], [torch.zeros(40, 3)], None, True)
    assert not update.any() and not shift.any()


def test_layers_that_read_the_same_are_fitted_from_one_sum():
    x, r = torch.randn(50, 4), {"a": torch.randn(50, 2), "b": torch.randn(50, 3)}
    together = LeastSquares(0.1, True)
    for chunk in range(0, 50, 20):
        together.add(x[chunk : chunk + 20], {k: v[chunk : chunk + 20] for k, v in r.items()})
    for name, residual in r.items():
        for one, other in zip(together.solve(name), least_squares_update([x], [residual], 0.1, True), strict=True):
            assert torch.allclose(one, other, atol=1e-5)


def test_a_layer_without_bias_beside_one_with_it():
    modules = {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2, bias=False)}
    found = _sums_of([Unit(path) for path in "ab"], modules, (), 0.1)
    assert [(fit.intercept, paths) for fit, paths in found] == [(True, ["a"]), (False, ["b"])]


def test_norms_add_up_too():
    u, t = torch.randn(90, 5) * 3 + 7, torch.randn(90, 5) - 4
    parts = NormFit()
    for a, b in zip(u.split(40), t.split(40), strict=True):
        parts.add(a, b)
    for one, other in zip(parts.solve(), norm_fit(u, t), strict=True):
        assert torch.allclose(one.double(), other.double(), atol=1e-12)


# What is computed


def test_every_layer_of_a_block_runs_once_a_batch(monkeypatch):
    found, cuts, student = prepared("bert", "ForSequenceClassification")
    runs, forward = Counter(), nn.Linear.forward

    def counted(module, x):
        runs[module] += 1
        return forward(module, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    refit(student, found.teacher, found.anatomy, cuts, found.batches, 1e-3, progress=False)
    for model in (student, found.teacher):
        inside = [m for m in model.bert.encoder.modules() if isinstance(m, nn.Linear)]
        # once more for the head, on one sample of the first batch; all but the last block to see what each is given
        more = [runs[m] - len(found.batches) for m in inside]
        assert len(inside) == 12 and more == 6 * [2] + 6 * [1]


def test_spectra_are_computed_where_they_are_read(monkeypatch):
    model, data, asked = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert"), []
    original = surgeon.signal_subspace
    monkeypatch.setattr(surgeon, "signal_subspace", lambda *a, **k: asked.append(1) or original(*a, **k))
    small = narrow(model, data, RECIPE, progress=False)
    assert not asked
    reduced = reduce(model, data, RECIPE, progress=False)
    assert len(asked) == len(reduced.report.sites) == 8
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), reduced.model.state_dict().values()))
    asked.clear()
    narrow(model, data, RECIPE.replace(allocation="edge"), progress=False)
    assert asked


# Runs that go on from what is finished


class Block(nn.Module):
    """Outputs in tuples, a module called twice, and changes in place: all that may go wrong when runs go on."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.twice, self.pair, self.norm = nn.Tanh(), Pair(), nn.LayerNorm(4)

    def forward(self, x):
        a = self.twice(self.first(x))
        b, _ = self.pair(a)
        c = self.second(b)
        c += x
        d = self.norm(self.twice(c).mul_(2.0))
        d.add_(1.0)
        return self.third(d) + c


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x), None


@pytest.mark.parametrize("order", [("first", "second", "norm", "third"), ("norm", "first", "third", "second")])
def test_going_on_is_running_anew(order, monkeypatch):
    """Also where a layer is fitted after another that comes behind it."""
    monkeypatch.setattr("optimum_rmtkd.batches.storing.HELD", 100)
    torch.manual_seed(0)
    block, data = Block(), [torch.randn(3, 4) for _ in range(3)]
    scope = Scope(block, lambda i: block(data[i].clone()), [None] * 3)
    groups = [([path], [Point(path, "input")]) for path in order]
    progress = Progress(scope, groups)
    for step, path in enumerate(order):
        for index, seen in enumerate(progress.through(step)):
            expected = scope.watch(index, groups[step][1])
            assert all(torch.allclose(seen[p], expected[p]) for p in expected), (path, index)
        with torch.no_grad():
            block.get_submodule(path).weight.mul_(-1.7)
    for index in range(3):
        with torch.no_grad():
            assert torch.allclose(progress.output(index), scope.run(index))
    assert not any("forward" in module.__dict__ for module in block.modules())


class Network(nn.Module):
    def __init__(self, reads_all: bool):
        super().__init__()
        self.blocks, self.head, self.reads_all = (
            nn.ModuleList(nn.Linear(4, 4) for _ in range(3)),
            nn.Linear(4, 2),
            reads_all,
        )

    def forward(self, x):
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1]))
        return self.head(sum(states) if self.reads_all else states[-1])


@pytest.mark.parametrize("reads_all", [False, True])
def test_a_head_is_run_behind_known_blocks_only_where_it_reads_no_more(reads_all):
    torch.manual_seed(0)
    model, data = Network(reads_all), [torch.randn(6, 4) for _ in range(2)]
    whole = Scope(model, lambda i: model(data[i]), [None] * 2)
    behind = Replay(model, tuple(f"blocks.{i}" for i in range(3)), whole).behind(
        whole, lambda: model(data[0][:2]), 1 / 3, [Point("head", "input"), Point("head")]
    )
    assert (behind is whole) == reads_all
    with torch.no_grad():
        assert all(torch.allclose(behind.run(i), model(data[i])) for i in range(2))


# What is held


class Held(TorchDispatchMode):
    """The most bytes of tensors that were alive after an operation."""

    def __init__(self):
        super().__init__()
        self.made, self.peak, self.calls = [], 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu"]
        self.made += [weakref.ref(tensor) for tensor in tensors]
        self.calls += 1
        if self.calls % 7:  # what grows is alive for longer than that
            return made
        self.made = [ref for ref in self.made if ref() is not None]
        alive = [tensor.untyped_storage() for ref in self.made if (tensor := ref()) is not None]
        self.peak = max(self.peak, sum({storage.data_ptr(): storage.nbytes() for storage in alive}.values()))
        return made


@contextlib.contextmanager
def nothing_in_memory(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("optimum_rmtkd.batches.storing.HELD", 0)
        yield


@pytest.mark.parametrize("name, task", [MODELS[0], pytest.param(*MODELS[2], marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_number_of_batches(name, task, monkeypatch):
    peaks = {}
    for count in (4, 16):  # of the same kinds: texts are regrouped by length
        model, data = zoo.make(name, task), zoo.batches(name, count, size=4)
        with nothing_in_memory(monkeypatch):
            config = RECIPE.replace(calibration_samples=4 * count)
            with Held() as calibration:
                found = Surgeon(model, iter(data), config, progress=False)
            couples = {s.couple: max(4, s.group_width // 2) for s in found.sites}
            cuts, student = found._cuts(found.anatomy, couples, False), found.operate(couples)[0]
            with Held() as fit:
                refit(student, found.teacher, found.anatomy, cuts, found.batches, 1e-3, progress=False)
        peaks[count] = calibration.peak, fit.peak
    for few, many in zip(peaks[4], peaks[16], strict=True):
        assert many < 1.1 * few, peaks
