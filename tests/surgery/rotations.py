"""A model in another basis of its stream."""

from __future__ import annotations

import torch

from optimum_rmtkd.surgery.bases import Projection, rotate_onto_ones
from optimum_rmtkd.surgery.directions import _before_norms
from optimum_rmtkd.surgery.narrowing import Cuts, build_student, fold_norms, initialise
from optimum_rmtkd.surgery.norms import norm_of
from optimum_rmtkd.surgery.sites import get_module
from optimum_rmtkd.surgery.surgeon import anatomy_of


def rotated(model, recipe, seed=3, anyway=False):
    """The same model in another basis of its stream: random, but for the all-ones direction of layer norms; axes in
    another order and of other signs, where norms stand between layers and the stream."""
    anatomy = anatomy_of(model, recipe)
    teacher = fold_norms(model, anatomy)
    width = anatomy.sites["hidden"].width
    basis = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=torch.manual_seed(seed)))[0]
    if norm_of(get_module(model, anatomy.last_norm)).centres:
        ones = torch.full((width,), width**-0.5, dtype=torch.float64)
        basis = rotate_onto_ones(basis, basis.T @ ones)
    if any(unit.behind for unit in anatomy.units) and not anyway:
        basis = torch.eye(width, dtype=torch.float64)[torch.randperm(width)] * basis[0].sign()
    cuts = Cuts({"hidden": {"": Projection(basis, basis), **_before_norms(teacher, anatomy, basis)}})
    student = build_student(teacher, anatomy, {"hidden": anatomy.sites["hidden"].group_width}, {}, {})
    initialise(student, teacher, anatomy, cuts)
    student.tie_weights(recompute_mapping=False)
    return student
