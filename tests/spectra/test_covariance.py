from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optimum_rmtkd.errors import CalibrationError, RMTKDError
from optimum_rmtkd.spectra import SecondMoments, sample_tokens


HERE = Path(__file__).parent


def sequences(batch=24, length=7, dim=11, seed=0, mean=50.0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 3, dim, dtype=torch.float64)
    return torch.randn(batch, length, dim, generator=generator, dtype=torch.float64) * scale + mean


def one_shot(rows, weight=None):
    weight = torch.ones(len(rows), dtype=torch.float64) if weight is None else weight
    mean = (weight[:, None] * rows).sum(0) / weight.sum()
    centred = rows - mean
    return mean, (weight[:, None] * centred).T @ centred / weight.sum()


def assert_close(got, expected, tolerance=1e-12):
    assert float((got - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("chunks", [[24], [1] * 24, [5, 1, 17, 1], [20, 4]])
def test_any_chunking_gives_the_one_shot_result(chunks):
    x = sequences()
    mean, covariance = one_shot(x.reshape(-1, 11))
    moments = SecondMoments(11)
    for chunk in x.split(chunks):
        moments.update(chunk)
    assert moments.count == 24 * 7
    assert_close(moments.mean, mean)
    assert_close(moments.covariance, covariance)
    assert_close(moments.second_moment, x.reshape(-1, 11).T @ x.reshape(-1, 11) / (24 * 7))
    whole = SecondMoments(11)
    whole.update(x)
    assert moments.n_effective == pytest.approx(whole.n_effective, rel=1e-9)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]])
def test_any_merge_order_gives_the_one_shot_result(order):
    x = torch.cat([sequences(6, seed=s, mean=10.0 * s) for s in range(4)])
    parts = []
    for piece in x.split(6):
        parts.append(SecondMoments(11))
        parts[-1].update(piece)
    merged = SecondMoments(11)
    assert merged.merge(SecondMoments(11)) is merged
    for index in order:
        merged.merge(parts[index])
    mean, covariance = one_shot(x.reshape(-1, 11))
    assert_close(merged.mean, mean)
    assert_close(merged.covariance, covariance)
    whole = SecondMoments(11)
    whole.update(x)
    assert merged.n_effective == pytest.approx(whole.n_effective, rel=1e-8)
    untouched = SecondMoments(11)
    untouched.update(x[:6])
    assert_close(parts[0].covariance, untouched.covariance)


def test_a_nested_merge_is_the_same():
    parts = []
    for seed in range(4):
        parts.append(SecondMoments(11))
        parts[-1].update(sequences(3, seed=seed))
    expected = one_shot(torch.cat([sequences(3, seed=s) for s in range(4)]).reshape(-1, 11))[1]
    assert_close(parts[3].merge(parts[1]).merge(parts[0].merge(parts[2])).covariance, expected)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-5), (torch.float16, 2e-5)])
def test_a_large_mean_costs_no_precision_in_low_precision_input(dtype, tolerance):
    x = sequences(64, 16, mean=300.0).to(dtype)
    moments = SecondMoments(11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for chunk in x.split(8):
            moments.update(chunk)
    assert moments.covariance.dtype == torch.float64
    assert_close(moments.covariance, one_shot(x.double().reshape(-1, 11))[1], tolerance)


def test_masks_and_weights():
    x, generator = sequences(), torch.Generator().manual_seed(1)
    mask = torch.rand(24, 7, generator=generator) < 0.6
    weight = torch.rand(24, 7, generator=generator, dtype=torch.float64)
    spoiled = x.clone()
    spoiled[~mask] = float("nan")
    plain, weighted = SecondMoments(11), SecondMoments(11)
    for rows in torch.arange(24).split(5):
        plain.update(spoiled[rows], mask[rows].long())
        weighted.update(spoiled[rows], mask[rows], weight[rows])
    assert_close(plain.covariance, one_shot(x[mask])[1])
    assert plain.count == weighted.count == int(mask.sum())
    assert plain.sample_size == plain.count
    assert_close(weighted.covariance, one_shot(x[mask], weight[mask])[1])
    assert_close(weighted.mean, one_shot(x[mask], weight[mask])[0])
    assert weighted.sample_size == pytest.approx(float(weight[mask].sum() ** 2 / weight[mask].square().sum()))


def test_halves_are_disjoint_and_together_the_whole():
    x = sequences()
    moments = SecondMoments(11)
    moments.update(x)
    first, second = moments.half_covariances()
    assert_close(first, one_shot(x[0::2].reshape(-1, 11))[1])
    assert_close(second, one_shot(x[1::2].reshape(-1, 11))[1])
    for chunk in sequences(60, seed=2).split(1):
        moments.update(chunk)
    counts = moments.state_dict()["sums.scalars"][:, 0]
    assert float(counts.max() - counts.min()) <= 7 and int(counts.sum()) == 84 * 7


def test_gradient_moment_is_uncentred():
    g = sequences(mean=3.0)
    mask = torch.arange(7).expand(24, 7) < 4
    moments = SecondMoments(11)
    assert moments.gradient_moment is None and moments.gradient_count == 0
    for chunk, kept in zip(g.split(5), mask.split(5)):
        moments.update_gradient(chunk, kept)
    rows = g[mask]
    assert moments.gradient_count == len(rows)
    assert_close(moments.gradient_moment, rows.T @ rows / len(rows))


def test_null_moments_are_centred_with_the_final_mean():
    """The oracle stores the samples, centres with the final mean, flips signs, and takes the largest eigenvalue."""
    x = sequences(400, 4, 40)
    x[200:] += 0.5  # the first chunk's mean is not the final one
    rows = x.reshape(-1, 40)
    moments = SecondMoments(40, null_moments=True, seed=3)
    for chunk in x.split(50):
        moments.update(chunk)
    null = moments.null_covariance
    assert_close(null.diagonal(), moments.covariance.diagonal())
    centred = rows - rows.mean(0)
    oracle = []
    for seed in range(20):
        signs = torch.randint(0, 2, rows.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        flipped = centred * signs
        oracle.append(float(torch.linalg.eigvalsh(flipped.T @ flipped / len(rows))[-1]))
    oracle = torch.tensor(oracle)
    assert abs(float(torch.linalg.eigvalsh(null)[-1]) - float(oracle.mean())) < 4 * float(oracle.std())
    assert SecondMoments(40).null_covariance is None


def test_null_moments_are_deterministic():
    def run(seed):
        moments = SecondMoments(11, null_moments=True, seed=seed)
        torch.rand(3)  # the global generator plays no part
        moments.update(sequences())
        return moments.null_covariance

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


def test_state_dict_resumes_exactly(tmp_path):
    from safetensors.torch import load_file, save_file

    chunks = sequences().split(5)
    straight, first = (SecondMoments(11, null_moments=True) for _ in range(2))
    for chunk in chunks:
        straight.update(chunk)
        straight.update_gradient(chunk)
    for chunk in chunks[:2]:
        first.update(chunk)
        first.update_gradient(chunk)
    state = first.state_dict()
    save_file({k: v for k, v in state.items() if isinstance(v, torch.Tensor)}, tmp_path / "moments.safetensors")
    plain = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}
    resumed = SecondMoments(11, null_moments=True)
    resumed.load_state_dict(plain | load_file(tmp_path / "moments.safetensors"))
    for chunk in chunks[2:]:
        resumed.update(chunk)
        resumed.update_gradient(chunk)
    for name, value in straight.state_dict().items():
        same = (
            torch.equal(value, resumed.state_dict()[name])
            if isinstance(value, torch.Tensor)
            else value == resumed.state_dict()[name]
        )
        assert same, name
    assert all(
        v.numel() <= 2 * 11 * 11 or k == "generator" or "lag" in k
        for k, v in state.items()
        if isinstance(v, torch.Tensor)
    )
    with pytest.raises(RMTKDError, match="dim=11"):
        SecondMoments(12).load_state_dict(state)
    empty = SecondMoments(11)
    empty.load_state_dict(SecondMoments(11).state_dict())
    assert empty.count == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_counted_and_leave_the_sums_untouched(bad):
    moments = SecondMoments(11, null_moments=True)
    x = sequences(2).float()
    spoiled = x.clone()
    spoiled[0, 0, :3] = bad
    with pytest.raises(CalibrationError, match="3 of 154 values"):
        moments.update(spoiled)
    assert moments.count == 0
    moments.update(x)
    before = moments.covariance
    with pytest.raises(CalibrationError, match="3 of 11 channels"):
        moments.update(spoiled)
    with pytest.raises(CalibrationError, match="gradients"):
        moments.update_gradient(spoiled)
    assert torch.equal(before, moments.covariance) and moments.gradient_moment is None


def test_bad_input():
    moments = SecondMoments(11)
    with pytest.raises(CalibrationError, match="No samples"):
        moments.covariance  # noqa: B018
    moments.update(sequences(2), torch.zeros(2, 7, dtype=torch.bool))
    with pytest.raises(CalibrationError, match="masked"):
        moments.mean  # noqa: B018
    with pytest.raises(CalibrationError, match=r"\(\.\.\., 11\)"):
        moments.update(torch.zeros(3, 5))
    with pytest.raises(CalibrationError, match="floating point"):
        moments.update(torch.zeros(3, 11, dtype=torch.long))
    with pytest.raises(CalibrationError, match="mask of shape"):
        moments.update(sequences(2), torch.ones(2, 6))
    with pytest.raises(CalibrationError, match="at least 0"):
        moments.update(sequences(2), weight=-torch.ones(2, 7))
    with pytest.raises(CalibrationError, match="overflow"):
        moments.update(torch.tensor([[1e30] * 11, [-1e30] * 11]))
    with pytest.raises(RMTKDError, match="dim=4"):
        moments.merge(SecondMoments(4))
    with pytest.raises(RMTKDError, match="at least one channel"):
        SecondMoments(0)


def test_sample_units():
    x = torch.arange(2 * 20, dtype=torch.float32).reshape(2, 20, 1)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 5:] = False
    assert sample_tokens(x, mask, "token") == (x, mask)
    spaced, kept = sample_tokens(x, mask, "spaced")
    assert spaced[0, :, 0].tolist() == [1, 3, 6, 8, 11, 13, 16, 18] and kept[0].all()
    assert spaced[1, kept[1], 0].tolist() == [20, 21, 22, 23, 24]
    assert torch.equal(sample_tokens(x, None, "spaced")[0][0], spaced[0])
    left = mask.flip(1)
    assert sample_tokens(x, left, "spaced")[0][1, :5, 0].tolist() == [35, 36, 37, 38, 39]
    means, kept = sample_tokens(x, torch.stack([mask[1], torch.zeros(20, dtype=torch.bool)]), "sequence_mean")
    assert means[0].item() == 2.0 and kept.tolist() == [True, False]
    assert sample_tokens(x[0], None, "spaced")[0] is not None
    short = x[:, :6]
    assert sample_tokens(short, mask[:, :6], "spaced")[0] is short
    with pytest.raises(RMTKDError, match="spaced"):
        sample_tokens(x, mask, "word")


def test_all_reduce_over_processes(tmp_path):
    sys.path.insert(0, str(HERE))
    try:
        from reduce_script import batches
    finally:
        sys.path.remove(str(HERE))
    world, environment = 3, os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "reduce_script.py")]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(tmp_path / "meet"), str(tmp_path / "out")], env=environment
        )
        for rank in range(world)
    ]
    assert [process.wait(timeout=60) for process in processes] == [0] * world
    rows = torch.cat([batches(rank).reshape(-1, 5) for rank in range(2)])
    for rank in range(world):
        moments = SecondMoments(5, null_moments=True)
        moments.load_state_dict(torch.load(f"{tmp_path}/out.{rank}", weights_only=True))
        assert moments.count == len(rows)
        assert_close(moments.covariance, one_shot(rows)[1])
        assert moments.gradient_count == 60
        assert_close(moments.null_covariance.diagonal(), moments.covariance.diagonal(), 1e-9)


def test_all_reduce_of_one_process_changes_nothing():
    class OneProcess:
        num_processes = 1

    moments = SecondMoments(11)
    moments.update(sequences())
    before = moments.covariance
    assert moments.all_reduce() is moments and moments.all_reduce(OneProcess()) is moments
    assert torch.equal(before, moments.covariance)


def test_large_covariances_are_exactly_symmetric():
    """Weights make the product of a block with itself unsymmetric by rounding."""
    x = torch.randn(40, 516, generator=torch.Generator().manual_seed(3))
    moments = SecondMoments(516)
    moments.update(x, weight=torch.rand(40, generator=torch.Generator().manual_seed(4)))
    for found in (moments.covariance, *moments.half_covariances()):
        assert torch.equal(found, found.T)
