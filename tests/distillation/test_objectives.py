from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optimum_rmtkd.config import RMTKDConfig
from optimum_rmtkd.distillation import (
    DistillationObjective,
    DistillationStep,
    HiddenStateLoss,
    KLDivergence,
    TaskLoss,
    build_objectives,
    default_objectives,
    register_objective,
)
from optimum_rmtkd.errors import RMTKDError


class Head(nn.Module):
    """Stands for a model where an objective only reads its config."""

    def __init__(self, loss_type=None, **config):
        super().__init__()
        self.config, self.loss_type = SimpleNamespace(**config), loss_type
        self.weight = nn.Parameter(torch.zeros(1))


def kl(student, teacher, temperature=1.0, inputs=None, mask=None, key="logits", **head):
    objective = KLDivergence(weight=1.0, temperature=temperature)
    objective.setup(Head(**head), Head(**head), {})
    return objective(
        DistillationStep(inputs or {}, student_outputs={key: student}, teacher_outputs={key: teacher}, mask=mask)
    )


# -- registry ---------------------------------------------------------------------------------------------------------


def test_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(RMTKDError, match="'klx'.*hidden.*kl.*task"):
        DistillationObjective.from_dict({"name": "klx"})


@pytest.mark.parametrize("objective", [TaskLoss(0.3), KLDivergence(0.7, temperature=2.0), HiddenStateLoss(1.5)])
def test_dictionary_both_ways(objective):
    again = DistillationObjective.from_dict(objective.to_dict())
    assert type(again) is type(objective) and again.to_dict() == objective.to_dict()


def test_unknown_argument_and_negative_weight_are_refused():
    with pytest.raises(RMTKDError, match="kl takes no temp; expected among weight, temperature"):
        DistillationObjective.from_dict({"name": "kl", "temp": 2})
    with pytest.raises(RMTKDError, match="weight=-1"):
        TaskLoss(-1)


def test_build_from_a_mapping_and_refusals():
    built = build_objectives({"task": {"weight": 0.5}, "kl": {"temperature": 2.0}})
    assert [o.name for o in built] == ["task", "kl"] and built[1].temperature == 2.0
    with pytest.raises(RMTKDError, match="each label once"):
        build_objectives([TaskLoss(), TaskLoss()])
    with pytest.raises(RMTKDError, match="holds a int"):
        build_objectives([3])


def test_a_list_takes_the_short_form_too():
    first, second = build_objectives([{"kl": {"temperature": 2.0}}, {"back": {"name": "kl", "reverse": True}}])
    assert (first.label, first.temperature, second.label, second.reverse) == ("kl", 2.0, "back", True)


def test_registering_needs_a_free_name():
    with pytest.raises(RMTKDError, match="belongs to KLDivergence"):

        @register_objective
        class Other(DistillationObjective):
            name = "kl"

    with pytest.raises(RMTKDError, match="has no name"):

        @register_objective
        class Nameless(DistillationObjective):
            pass


def test_defaults_follow_the_recipe():
    names = {o.name: o.weight for o in default_objectives(RMTKDConfig(task_weight=0.25, kl_weight=0, hidden_weight=2))}
    assert names == {"task": 0.25, "hidden": 2}


# -- task -------------------------------------------------------------------------------------------------------------


def test_task_loss_prefers_the_trainers_and_names_what_is_missing():
    task = TaskLoss()
    assert task(DistillationStep({}, {"loss": torch.tensor(1.0)}, task_loss=torch.tensor(2.0))) == 2.0
    assert task(DistillationStep({}, {"loss": torch.tensor(1.0)})) == 1.0
    with pytest.raises(RMTKDError, match="returned logits for inputs pixel_values: no loss"):
        task(DistillationStep({"pixel_values": 0}, {"logits": torch.zeros(1)}))


# -- divergence -------------------------------------------------------------------------------------------------------


def test_kl_closed_form_of_two_classes():
    p, q = 0.8, 0.3
    theirs, ours = (torch.tensor([[math.log(v), math.log(1 - v)]]) for v in (p, q))
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert kl(ours, theirs).item() == pytest.approx(expected, rel=1e-6)


def test_kl_temperature_factor_is_applied_once():
    torch.manual_seed(0)
    ours, theirs, t = torch.randn(5, 4), torch.randn(5, 4), 3.0
    p, q = F.softmax(theirs / t, -1), F.softmax(ours / t, -1)
    assert torch.allclose(kl(ours, theirs, t), t * t * (p * (p / q).log()).sum(-1).mean(), rtol=1e-5)


def test_kl_of_tokens_ignores_masked_labels_even_when_they_are_nan():
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5)
    labels = torch.tensor([[1, -100, 2], [-100, -100, 3]])
    clean = kl(ours, theirs, inputs={"labels": labels})
    keep = labels != -100
    expected = F.kl_div(ours[keep].log_softmax(-1), theirs[keep].softmax(-1), reduction="batchmean")
    assert torch.allclose(clean, expected, rtol=1e-5)
    spoilt_ours, spoilt_theirs = ours.detach().clone(), theirs.clone()
    spoilt_ours[~keep], spoilt_theirs[~keep] = float("nan"), float("inf")
    spoilt_ours.requires_grad_()
    value = kl(spoilt_ours, spoilt_theirs, inputs={"labels": labels})
    assert torch.equal(value, clean)
    value.backward()
    assert torch.isfinite(spoilt_ours.grad).all()


def test_kl_without_any_counted_token_is_zero_and_differentiable():
    ours = torch.randn(1, 2, 5, requires_grad=True)
    value = kl(ours, torch.randn(1, 2, 5), inputs={"labels": torch.full((1, 2), -100)})
    value.backward()
    assert value.item() == 0.0 and ours.grad.abs().sum() == 0


def test_kl_of_a_causal_model_shifts_the_labels():
    torch.manual_seed(0)
    ours, theirs = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    labels = torch.tensor([[7, -100, 2]])  # only the answer at position 1, for label 2, counts
    value = kl(ours, theirs, inputs={"labels": labels}, loss_type="ForCausalLM")
    assert torch.allclose(value, F.kl_div(ours[:, 1].log_softmax(-1), theirs[:, 1].softmax(-1), reduction="batchmean"))


def test_kl_of_unlabelled_tokens_uses_the_attention_mask():
    torch.manual_seed(0)
    ours, theirs, mask = torch.randn(1, 3, 4), torch.randn(1, 3, 4), torch.tensor([[True, True, False]])
    assert torch.allclose(kl(ours, theirs, mask=mask), kl(ours[:, :2], theirs[:, :2]))


def test_kl_of_spans_ignores_padding():
    torch.manual_seed(0)
    mask = torch.tensor([[True, True, True, False]])
    outputs = [{n: torch.randn(1, 4) for n in ("start_logits", "end_logits")} for _ in range(2)]
    objective = KLDivergence()
    objective.setup(Head(), Head(), {})
    value = objective(DistillationStep({}, outputs[0], outputs[1], mask=mask))
    parts = [
        F.kl_div(outputs[0][n][:, :3].log_softmax(-1), outputs[1][n][:, :3].softmax(-1), reduction="batchmean")
        for n in outputs[0]
    ]
    assert torch.allclose(value, sum(parts) / 2, rtol=1e-5)


def test_regression_is_the_squared_distance_to_the_teachers_output():
    ours, theirs = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]])
    assert kl(ours, theirs, temperature=5.0, num_labels=1).item() == pytest.approx((1 + 4) / 2)


def test_several_labels_at_once_are_independent_bernoullis():
    torch.manual_seed(0)
    ours, theirs = torch.randn(3, 4), torch.randn(3, 4)
    p, q = theirs.sigmoid(), ours.sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1).mean()
    assert torch.allclose(kl(ours, theirs, problem_type="multi_label_classification"), expected, rtol=1e-4)


def test_one_label_of_several_at_once_is_a_bernoulli_too():
    ours, theirs = torch.tensor([[0.3], [-1.0]]), torch.tensor([[1.0], [0.5]])
    p, q = theirs.sigmoid(), ours.sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    found = kl(ours, theirs, problem_type="multi_label_classification", num_labels=1)
    assert torch.allclose(found, expected, rtol=1e-4)


def test_task_loss_without_any_label_is_zero_whatever_the_logits():
    logits = torch.randn(1, 3, 4)
    logits[0, 1] = float("-inf")
    logits.requires_grad_()
    inputs = {"input_ids": torch.ones(1, 3), "labels": torch.full((1, 3), -100)}
    step = DistillationStep(inputs, {"loss": torch.tensor(float("nan")), "logits": logits})
    value = TaskLoss()(step)
    value.backward()
    assert value == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_kl_is_computed_in_fp32():
    torch.manual_seed(0)
    ours, theirs = torch.randn(4, 3).bfloat16(), torch.randn(4, 3).bfloat16()
    assert kl(ours, theirs).dtype == torch.float32
    assert torch.equal(kl(ours, theirs), kl(ours.float(), theirs.float()))


def test_kl_names_shapes_and_outputs_that_do_not_fit():
    with pytest.raises(RMTKDError, match=r"\(2, 3\).*\(2, 4\)"):
        kl(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(RMTKDError, match="needs logits; the student returned last_hidden_state"):
        kl(torch.zeros(2, 3), torch.zeros(2, 3), key="last_hidden_state")


# -- hidden states ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hidden(monkeypatch):
    """A HiddenStateLoss over blocks "a", "b" of the student and "A", "B" of the teacher."""

    def make(projections, blocks=(("a", "A"), ("b", "B"))):
        student, teacher = Head(), Head()
        names = {id(student): tuple(s for s, _ in blocks), id(teacher): tuple(t for _, t in blocks)}
        monkeypatch.setattr("optimum_rmtkd.surgery.block_paths", lambda model: names[id(model)])
        objective = HiddenStateLoss()
        objective.setup(student, teacher, projections)
        return objective

    return make


def test_hidden_states_against_the_slow_formula(hidden):
    torch.manual_seed(0)
    matrix, mask = torch.randn(6, 3), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    ours = {n: torch.randn(2, 3, 3) for n in "ab"}
    theirs = {n: torch.randn(2, 3, 6) for n in "AB"}
    value = hidden({"hidden": matrix})(DistillationStep({}, None, None, ours, theirs, mask))
    expected = 0.0
    for s, t in zip("ab", "AB", strict=True):
        errors, targets = [], []
        for i in range(2):
            for j in range(3):
                if mask[i, j]:
                    goal = theirs[t][i, j] @ matrix
                    targets += goal.tolist()
                    errors += (ours[s][i, j] - goal).square().tolist()
        expected += (sum(errors) / len(errors)) / torch.tensor(targets).var().item() / 2
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_hidden_states_are_zero_on_the_projected_teacher_and_ignore_padding(hidden):
    torch.manual_seed(0)
    matrix, theirs = torch.randn(6, 3), {n: torch.randn(2, 3, 6) for n in "AB"}
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    ours = {n.lower(): (theirs[n] @ matrix).masked_fill(~mask[..., None], float("nan")) for n in "AB"}
    step = DistillationStep({}, None, None, ours, theirs, mask)
    assert hidden({"hidden": matrix})(step).item() == pytest.approx(0.0, abs=1e-10)


def test_observed_variance_makes_the_loss_independent_of_the_split(hidden):
    torch.manual_seed(0)
    objective, theirs = hidden({}), {n: torch.randn(8, 4, 5) * 3 for n in "AB"}
    ours = {n.lower(): theirs[n] + torch.randn(8, 4, 5) for n in "AB"}

    def part(rows):
        return DistillationStep(
            {}, None, None, {k: v[rows] for k, v in ours.items()}, {k: v[rows] for k, v in theirs.items()}
        )

    for rows in (slice(0, 3), slice(3, 8)):
        objective.observe(part(rows))
    objective.finish()
    assert torch.allclose(objective.variance, torch.stack([theirs[n].var(correction=0) for n in "AB"]), rtol=1e-5)
    whole, halves = objective(part(slice(0, 8))), [objective(part(slice(i, i + 4))) for i in (0, 4)]
    assert torch.allclose(whole, sum(halves) / 2, rtol=1e-6)


def test_feature_maps_have_their_channels_as_features(hidden):
    torch.manual_seed(0)
    matrix, theirs = torch.randn(6, 2), {"A": torch.randn(2, 6, 4, 4)}
    ours = {"a": torch.einsum("nchw,ck->nkhw", theirs["A"], matrix)}
    step = DistillationStep({}, None, None, ours, theirs)
    assert hidden({"hidden": matrix}, blocks=(("a", "A"),))(step).item() == pytest.approx(0.0, abs=1e-10)


def test_a_block_without_known_projection_is_left_out_with_a_warning(hidden, caplog):
    theirs, ours = {"A": torch.randn(2, 6), "B": torch.randn(2, 6)}, {"a": torch.randn(2, 4), "b": torch.zeros(2, 6)}
    objective = hidden({})
    value = objective(DistillationStep({}, None, None, ours, theirs))
    assert "leaves out block 'a'" in caplog.text
    assert value.item() == pytest.approx((theirs["B"].square().mean() / theirs["B"].var()).item(), rel=1e-5)


def test_a_projection_of_another_teacher_is_refused(hidden):
    step = DistillationStep({}, None, None, {n: torch.zeros(2, 3) for n in "ab"}, {n: torch.zeros(2, 5) for n in "AB"})
    with pytest.raises(RMTKDError, match="5 wide, the student's projection expects 6"):
        hidden({"hidden": torch.zeros(6, 3)})(step)


def test_depths_must_agree(monkeypatch):
    student, teacher = Head(), Head()
    monkeypatch.setattr("optimum_rmtkd.surgery.block_paths", lambda model: ("a",) if model is student else ("A", "B"))
    with pytest.raises(RMTKDError, match="1 residual blocks, the teacher 2"):
        HiddenStateLoss().setup(student, teacher, {})
