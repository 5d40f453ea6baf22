"""Storage of trits: exact round trips, sizes on disk, damage, the generator, conversions."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_rmtkd import RMTKDError, SpecMismatchError, layers_rmtkd
from optimum_rmtkd.layers_rmtkd import TernaryLinear, TernaryMLP, counter_bits
from optimum_rmtkd.ternary.packing import (
    bits_per_weight,
    convert,
    pack_trits,
    packed_length,
    random_trits,
    serialized_bytes,
    unpack_trits,
)


RELU = {"name": "relu", "mean": 0.1}


def network(storage="base3", hidden=(300, 200), width=100, sparsity=0.9, **options) -> TernaryMLP:
    torch.manual_seed(0)
    return TernaryMLP(width, 5, list(hidden), [RELU] * len(hidden), storage, sparsity, **options)


@pytest.mark.parametrize("storage", ["base3", "2bit"])
@pytest.mark.parametrize("shape", [(1,), (4,), (5,), (6,), (7, 13), (20, 1), (250, 241), (0, 3)])
def test_round_trip(storage, shape):
    trits = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    packed = pack_trits(trits, storage)
    assert packed.dtype == torch.uint8 and packed.shape == (packed_length(trits.numel(), storage),)
    assert torch.equal(unpack_trits(packed, shape, storage), trits)


@pytest.mark.parametrize("storage", ["base3", "2bit"])
def test_round_trip_of_every_byte(storage):
    per_byte, base = layers_rmtkd.PACKINGS[storage]
    trits = torch.cartesian_prod(*[torch.tensor([-1, 0, 1], dtype=torch.int8)] * per_byte)
    packed = pack_trits(trits, storage)
    assert len(set(packed.tolist())) == 3**per_byte
    assert torch.equal(unpack_trits(packed, trits.shape, storage), trits)
    # the format itself: digits t + 1, the first trit counts least
    assert packed.tolist() == [sum((t + 1) * base**k for k, t in enumerate(row)) for row in trits.tolist()]


@pytest.mark.slow
def test_round_trip_of_four_million():
    trits = random_trits((2000, 2000), 0.9, seed=3, stream=0)
    for storage in ("base3", "2bit"):
        assert torch.equal(unpack_trits(pack_trits(trits, storage), trits.shape, storage), trits)


@pytest.mark.parametrize(("storage", "byte"), [("base3", 243), ("base3", 255), ("2bit", 3), ("2bit", 0b11000000)])
def test_bytes_that_encode_nothing(storage, byte):
    packed = pack_trits(torch.zeros(40, dtype=torch.int8), storage)
    packed[2] = byte
    with pytest.raises(SpecMismatchError, match=f"Byte 2 of the packed weights is {byte}, .* no {storage} trits"):
        unpack_trits(packed, (40,), storage)


@pytest.mark.parametrize("change", [lambda p: p[:-1], lambda p: torch.cat((p, p[:1])), lambda p: p.to(torch.int16)])
def test_other_lengths(change):
    packed = pack_trits(torch.zeros(40, dtype=torch.int8), "base3")
    with pytest.raises(SpecMismatchError, match="40 trits stored as base3 take 8 bytes"):
        unpack_trits(change(packed), (40,), "base3")


# The generator


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 2 / 3, 0.9])
def test_exact_counts(sparsity):
    trits = random_trits((101, 73), sparsity, seed=0, stream=0)
    each = round((1 - sparsity) * trits.numel() / 2)
    assert int((trits == 1).sum()) == int((trits == -1).sum()) == each


def test_generator_is_splitmix64():
    """An own sequential version of the published algorithm, in Python's integers."""

    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    for seed, stream in ((0, 0), (7, 2), (-1, 5), (2**63 - 1, 1)):
        start = mix((seed + stream * 0xD1342543DE82EF95) % 2**64)
        expected = [mix((start + i * 0x9E3779B97F4A7C15) % 2**64) for i in range(1, 50)]
        assert [x % 2**64 for x in counter_bits(seed, stream, 49).tolist()] == expected


def test_seeds_and_streams_differ():
    drawn = [random_trits((60, 60), 0.5, seed, stream) for seed in (0, 1) for stream in (0, 1)]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert abs(float((a.float() * b.float()).mean())) < 0.03  # 4 standard deviations of independent ones
    assert torch.equal(drawn[0], random_trits((60, 60), 0.5, 0, 0))


def test_places_are_uniform():
    """Mean over 200 seeds of each entry's square: the density, within 5 standard deviations."""
    squares = torch.stack([random_trits((8, 8), 0.75, seed, 0).float() for seed in range(200)])
    assert (squares.square().mean(0) - 0.25).abs().max() < 5 * (0.25 * 0.75 / 200) ** 0.5
    assert squares.mean(0).abs().max() < 5 * (0.25 / 200) ** 0.5


# Layers


def test_layer_multiplies_with_scaled_trits():
    layer = TernaryLinear(40, 30, "base3", 0.8, seed=1, stream=2)
    x = torch.randn(3, 4, 40)
    expected = x @ random_trits((30, 40), 0.8, 1, 2).T.float() / (0.2 * 40) ** 0.5
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert float(layer.weight.square().sum() * 1 / 30) == pytest.approx(1, rel=0.01)  # variance 1 / in_features


@pytest.mark.parametrize("storage", ["base3", "2bit", "seed"])
def test_storages_compute_the_same(storage):
    x = torch.randn(6, 100)
    assert torch.equal(network(storage)(x), network("base3")(x))


def test_sizes_on_disk():
    """Measured on the serialised file: at most 2 bits for each of the 90,000 hidden weights, scales and header
    included."""
    bits = {storage: bits_per_weight(network(storage)) for storage in ("base3", "2bit", "seed", "latent")}
    assert 1.6 <= bits["base3"] < 1.65 and 2.0 <= bits["2bit"] < 2.05 and bits["seed"] < 0.04
    assert 32 <= bits["latent"] < 32.1


def test_serialized_bytes_is_the_file(tmp_path):
    tensors = {"a": torch.zeros(1000), "b": torch.zeros(3, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert serialized_bytes(tensors) == (tmp_path / "x.safetensors").stat().st_size


def test_dense_matrix_follows_loading_and_dtype(tmp_path):
    model, other = network(seed=1), network(seed=2)
    x = torch.randn(2, 100)
    before = model(x)
    save_file(other.state_dict(), tmp_path / "x.safetensors")
    model.load_state_dict(load_file(tmp_path / "x.safetensors"))
    assert torch.equal(model(x), other(x)) and not torch.allclose(model(x), before)
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert not any("dense" in name for name in model.state_dict())


def test_dense_matrix_made_in_inference_mode_serves_training():
    model, x = network(), torch.randn(2, 100, requires_grad=True)
    with torch.inference_mode():
        model(x.detach())
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_checksum_of_the_seed():
    model = network("seed")
    model.layers[1].seed += 1
    model.layers[1].forget()
    with pytest.raises(SpecMismatchError, match="drawn from seed 1 have checksum"):
        model(torch.randn(1, 100))


@pytest.mark.parametrize("storage", ["base3", "2bit", "seed", "latent"])
def test_convert_keeps_the_outputs(storage):
    model, x = network("base3", bias=True), torch.randn(5, 100)
    model.input_mean.normal_()
    for layer in model.layers:
        torch.nn.init.normal_(layer.bias)
    twin = convert(model, storage)
    assert torch.allclose(twin(x), model(x), atol=1e-5)
    assert torch.equal(convert(twin, "base3").layers[0].packed, model.layers[0].packed)


def test_trained_weights_have_no_seed():
    model = convert(network("base3"), "latent")
    with torch.no_grad():
        model.layers[0].latent[0] *= -1
    with pytest.raises(RMTKDError, match="not the ones that the seed draws"):
        convert(model, "seed")
    with pytest.raises(RMTKDError, match="Unknown storage 'zip'.*base3, 2bit, seed, latent"):
        convert(model, "zip")


def test_latent_weights_learn_straight_through():
    model = network("latent", sparsity=0.5)
    assert float((model.layers[0].trits() == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    x, layer = torch.randn(8, 100), model.layers[0]
    layer(x).square().sum().backward()
    rounded = layer.weight.detach().clone().requires_grad_()
    (x @ rounded.T).square().sum().backward()
    assert torch.allclose(layer.latent.grad, rounded.grad, atol=1e-4)
    expected = (rounded.grad * rounded).sum()  # d / d log scale
    assert torch.allclose(layer.log_scale.grad, expected.detach(), rtol=1e-3)
