from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import BartConfig, BartModel

from optimum_rmtkd.distillation.objectives import fix_gauge
from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.reparameterization import (
    MatrixProductOperator,
    Powerpropagation,
    block_list,
    build_reparameterization,
    core_parameters,
    fold,
    folded_copy,
    is_reparameterized,
    mpo_decompose,
    mpo_factor,
    over_parameterize,
    plain_parameters,
)
from optimum_rmtkd.reparameterization.mpo import balanced_modes, choose_modes, full_bonds, mpo_contract
from optimum_rmtkd.reparameterization.targets import block_lists


def modes_of(rows, columns, number, kind="unit"):
    return choose_modes(rows, number, kind), choose_modes(columns, number, kind)


@pytest.mark.parametrize("number", [2, 3, 5, 7])
@pytest.mark.parametrize("kind", ["unit", "balanced"])
@pytest.mark.parametrize("shape", [(96, 24), (24, 96), (30, 30), (7, 12), (1, 8)])
def test_reconstruction(shape, number, kind):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    modes = modes_of(*shape, number, kind)
    tensors = mpo_decompose(weight, modes)
    assert [t.shape[0] for t in tensors] == full_bonds(modes)[:-1]
    assert (mpo_contract(tensors) - weight).norm() / weight.norm() < 5e-7
    assert mpo_factor(modes) == pytest.approx(sum(t.numel() for t in tensors) / weight.numel())


def test_contraction_is_the_sum_over_bonds():
    torch.manual_seed(0)
    tensors = [torch.randn(s) for s in ((1, 2, 3, 4), (4, 2, 2, 3), (3, 3, 2, 1))]
    slow = torch.einsum("aijb,bklc,cmnd->ikmjln", *tensors).reshape(12, 12)
    assert torch.allclose(mpo_contract(tensors), slow, atol=1e-5)


@pytest.mark.parametrize("kind", ["unit", "balanced", {48: [2, 4, 2, 3], 36: [3, 1, 6, 2]}])
@pytest.mark.parametrize("shape", [(48, 36), (36, 48), (96, 24)])
def test_singular_values_stand_as_square_roots_on_both_sides_of_each_bond(shape, kind):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    outs, ins = modes_of(*shape, 4, kind)
    tensors = [t.double() for t in mpo_decompose(weight, (outs, ins))]
    order = [axis for k in range(4) for axis in (k, 4 + k)]
    whole = weight.reshape(*outs, *ins).permute(order)
    left = torch.ones(1, 1, dtype=torch.float64)
    for k, tensor in enumerate(tensors[:-1]):
        left = (left @ tensor.reshape(tensor.shape[0], -1)).reshape(-1, tensor.shape[-1])
        right = tensors[-1].reshape(tensors[-1].shape[0], -1)
        for other in reversed(tensors[k + 1 : -1]):
            right = (other.reshape(-1, other.shape[-1]) @ right).reshape(other.shape[0], -1)
        singular = torch.linalg.svdvals(whole.reshape(len(left), -1))[: left.shape[1]].diag()
        torch.testing.assert_close(left.T @ left, singular, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(right @ right.T, singular, rtol=1e-4, atol=1e-4)


def test_middle_tensors_start_as_identities():
    tensors = mpo_decompose(torch.randn(64, 48), modes_of(64, 48, 5))
    for tensor in tensors[1:-1]:
        assert torch.equal(tensor[:, 0, 0], torch.eye(tensor.shape[0]))


def test_null_directions_do_no_harm():
    weight = torch.randn(48, 64)
    weight[:, ::2] = 0
    tensors = mpo_decompose(weight, modes_of(48, 64, 5))
    assert all(torch.isfinite(t).all() for t in tensors)
    assert max(t.norm() for t in tensors) < 5 * weight.norm() ** 0.5 * 48**0.5


@pytest.mark.parametrize("columns", [slice(None, None, 2), slice(None)])
def test_null_directions_learn(columns):
    """The function class stays that of the matrix: no direction without a gradient."""
    weight = torch.randn(12, 16)
    weight[:, columns] = 0
    tensors = [t.requires_grad_() for t in mpo_decompose(weight, modes_of(12, 16, 3))]
    target, optimizer = torch.randn(12, 16), torch.optim.Adam(tensors, lr=3e-2)
    for _ in range(1500):
        loss = (mpo_contract(tensors) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3


def test_factor_formula_and_the_authors_modes():
    for number, factor in ((3, 2.125), (5, 3.25), (7, 4.375)):
        for shape in ((768, 768), (3072, 768)):
            assert mpo_factor(modes_of(*shape, number)) == pytest.approx(factor)
    assert choose_modes(768, 5) == (32, 1, 1, 1, 24) and choose_modes(3072, 5) == (64, 1, 1, 1, 48)
    assert mpo_factor(modes_of(1536, 384, 3, "balanced")) < 1.1


def test_modes_given_by_the_user():
    assert choose_modes(12, 3, {12: [2, 3, 2]}) == (2, 3, 2) == choose_modes(12, 3, {"12": [2, 3, 2]})
    assert choose_modes(16, 3, {12: [2, 3, 2]}) == (4, 1, 4)
    with pytest.raises(RMTKDError, match="expected 3 factors whose product is 12"):
        choose_modes(12, 3, {12: [2, 3, 3]})
    assert balanced_modes(1536, 3) == (16, 12, 8) and math.prod(balanced_modes(97, 4)) == 97


def blocks(depth=2):
    layers = [nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}) for _ in range(depth)]
    return nn.ModuleDict({"layers": nn.ModuleList(layers), "head": nn.Linear(8, 3)})


def run(model, x):
    for layer in model["layers"]:
        x = x + layer["down"](torch.tanh(layer["up"](x)))
    return model["head"](x)


def test_apply_and_fold_leave_outputs_and_count_alone():
    torch.manual_seed(0)
    model, x = blocks(), torch.randn(5, 8)
    before, count = run(model, x), sum(p.numel() for p in model.parameters())
    paths = MatrixProductOperator(num_tensors=4).apply(model)
    assert paths == [f"layers.{i}.{name}" for i in (0, 1) for name in ("up", "down")]
    assert sum(p.numel() for p in model.parameters()) > count and is_reparameterized(model)
    during = run(model, x)
    assert torch.allclose(before, during, atol=1e-5)
    copy = folded_copy(model)
    assert is_reparameterized(model) and torch.equal(run(copy, x), during)
    names = set(dict(blocks().named_parameters()))
    assert set(plain_parameters(model)) == names
    assert fold(model) is model and torch.equal(run(model, x), during)  # zero difference
    assert sum(p.numel() for p in model.parameters()) == count and set(dict(model.named_parameters())) == names
    assert all(type(module) is nn.Linear for path, module in model.named_modules() if path in paths)


def test_bf16_weights_keep_their_dtype_and_autocast_stays_outside():
    model = blocks().to(torch.bfloat16)
    over_parameterize(model, {"name": "mpo", "num_tensors": 3})
    linear = model["layers"][0]["up"]
    assert linear.weight.dtype == torch.bfloat16 and linear.parametrizations.weight.original0.dtype == torch.float32
    wide = over_parameterize(blocks(), "mpo")["layers"][0]["up"]
    outside = mpo_contract(list(wide.parametrizations.weight.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wide.weight, outside)


def test_targets_as_in_peft():
    assert MatrixProductOperator(target_modules=["up"]).apply(blocks()) == ["layers.0.up", "layers.1.up"]
    assert MatrixProductOperator(target_modules=r"layers\.1\..*").apply(blocks()) == ["layers.1.up", "layers.1.down"]
    assert MatrixProductOperator(target_modules=["head"]).apply(blocks()) == ["head"]
    with pytest.raises(RMTKDError, match=r"target_modules=\['query'\] matches nothing.*down, head, up"):
        MatrixProductOperator(target_modules=["query"]).apply(blocks())
    tied = blocks()
    tied["layers"][1]["up"].weight = tied["layers"][0]["up"].weight
    assert MatrixProductOperator(target_modules=["up", "head"]).apply(tied) == ["head"]


def test_both_stacks_of_an_encoder_decoder_are_taken():
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    taken = MatrixProductOperator().apply(BartModel(BartConfig(vocab_size=20, **sizes, **heads)))
    assert sum(path.startswith("encoder.layers.0.") for path in taken) == 6
    assert sum(path.startswith(f"decoder.layers.{n}.") for path in taken for n in (0, 1)) == 20


def test_blocks_are_lists_of_modules_in_the_backbone():
    model = blocks()
    model["heads"] = nn.ModuleList([nn.Linear(8, 2)])  # leaves
    assert block_lists(model) == {"layers": ("layers.0", "layers.1")}


def test_only_tied_weights_is_said():
    tied = blocks()
    tied["layers"][1]["up"].weight = tied["layers"][0]["up"].weight
    with pytest.raises(RMTKDError, match=r"only tied weights in ModuleDict \(layers.0.up, layers.1.up\)"):
        MatrixProductOperator(target_modules=["up"]).apply(tied)


def test_parametrizations_of_the_architecture_itself_are_left_alone():
    model, x = blocks(), torch.randn(5, 8)
    nn.utils.parametrizations.weight_norm(model["head"])
    names, before = set(dict(model.named_parameters())), run(model, x)
    assert not is_reparameterized(model) and not core_parameters(model)
    MatrixProductOperator().apply(model)
    assert len(core_parameters(model)) == 4 * 3 and set(plain_parameters(model)) == names
    fold(model)
    assert set(dict(model.named_parameters())) == names and not is_reparameterized(model)
    assert torch.allclose(run(model, x), before, atol=1e-5)


def test_blocks_are_the_longest_list_of_one_type():
    assert block_list(blocks(3)) == ("layers.0", "layers.1", "layers.2")
    assert block_list(nn.Linear(2, 2)) == ()


def test_frozen_weights_stay_frozen():
    model = blocks()
    model["layers"][0].requires_grad_(False)
    MatrixProductOperator().apply(model)
    assert not any(p.requires_grad for p in model["layers"][0].parameters())
    fold(model)
    assert not model["layers"][0]["up"].weight.requires_grad and model["layers"][1]["up"].weight.requires_grad


@pytest.mark.parametrize("failing", ["a later module", "the checkpoint"])
@pytest.mark.parametrize("how", [MatrixProductOperator, Powerpropagation])
def test_what_fails_leaves_the_model_as_it_was(monkeypatch, how, failing):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    reparameterization, plain = how(target_modules=["0", "1", "2"]), how.parametrization
    if failing == "a later module":

        def parametrization(self, weight):
            if weight is before["1.weight"][0]:
                raise RuntimeError("no decomposition")
            return plain(self, weight)

        monkeypatch.setattr(how, "parametrization", parametrization)
    with pytest.raises(RuntimeError if failing == "a later module" else RMTKDError):
        reparameterization.apply(model, None if failing == "a later module" else {"of another": torch.zeros(1)})
    assert not is_reparameterized(model)
    after = dict(model.named_parameters())
    assert all(
        after[name] is parameter and torch.equal(after[name], value) for name, (parameter, value) in before.items()
    )


def test_state_both_ways_and_refusals():
    model, mpo = blocks(), MatrixProductOperator()
    mpo.apply(model)
    with torch.no_grad():
        model["layers"][0]["up"].parametrizations.weight.original1.mul_(2.0)
    state = {name: tensor.clone() for name, tensor in mpo.state(model).items()}
    again = fold(folded_copy(model))
    mpo.apply(again, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in mpo.state(again).items())
    with pytest.raises(RMTKDError, match="reparameterised already"):
        mpo.apply(again)
    with pytest.raises(RMTKDError, match="do not fit this mpo"):
        MatrixProductOperator(num_tensors=4).apply(folded_copy(model), state)


def test_registry():
    built = build_reparameterization({"name": "mpo", "num_tensors": 5})
    assert built.num_tensors == 5 and built.lr_scale == 0.25
    assert build_reparameterization(built.to_dict()).to_dict() == built.to_dict()
    assert build_reparameterization("powerpropagation").exponent == 2.0 and build_reparameterization(None) is None
    with pytest.raises(RMTKDError, match="mpo takes no tensors"):
        build_reparameterization({"name": "mpo", "tensors": 5})
    for bad in (
        {"num_tensors": 1},
        {"num_tensors": 2.5},
        {"modes": "square"},
        {"modes": {12: 12}},
        {"modes": {12: [-2, 3, -2]}},
        {"modes": {"12": [4, 3]}},
        {"lr_scale": 0},
        {"target_modules": "("},
    ):
        with pytest.raises(RMTKDError):
            MatrixProductOperator(**bad)


# -- gauge ------------------------------------------------------------------------------------------------------------


def test_near_weights_with_null_directions_have_near_tensors():
    """The split at a bond does not jump where a direction is nearly null."""
    weight = torch.randn(48, 64, dtype=torch.float64)
    weight[:, ::2] = 0
    for gap in (1e-4, 1e-2):
        change = torch.randn(48, 64, dtype=torch.float64)
        other = weight + gap * change * weight.norm() / change.norm()
        ours, theirs = (mpo_decompose(w, modes_of(48, 64, 3)) for w in (weight, other))
        turned = fix_gauge(theirs, ours)
        for k in (0, 2):
            assert (turned[k] - ours[k]).square().sum() / ours[k].square().sum() < 3 * gap


@pytest.mark.parametrize("gap", [1e-4, 1e-2, 1e-1])
@pytest.mark.parametrize("number", [3, 5])
def test_gauge_fix_leaves_the_matrix_and_brings_near_tensors_near(gap, number):
    torch.manual_seed(0)
    weight, noise = torch.randn(96, 48), torch.randn(96, 48)
    other = weight + gap * weight.norm() / noise.norm() * noise
    modes = modes_of(96, 48, number)
    ours, theirs = mpo_decompose(other, modes), mpo_decompose(weight, modes)
    turned = fix_gauge(theirs, ours)
    assert (mpo_contract(turned) - weight).norm() / weight.norm() < 1e-5
    outer = [((turned[k] - ours[k]).square().sum() / turned[k].square().sum()).item() for k in (0, number - 1)]
    assert sum(outer) / 2 <= gap**2 * 1.1 + 1e-9
    raw = [((theirs[k] - ours[k]).square().sum() / theirs[k].square().sum()).item() for k in (0, number - 1)]
    if gap == 1e-1:
        assert sum(raw) > 10 * sum(outer)
