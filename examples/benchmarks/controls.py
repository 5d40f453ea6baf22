"""What the method is compared with, at the same size, data and steps: the paper's recipe, random subspaces, random
weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from optimum_rmtkd import RMTKDConfig, RMTKDTrainer, count_parameters
from optimum_rmtkd.surgery.budget import parameters_of
from optimum_rmtkd.surgery.surgeon import Surgeon


PAPER = {
    "edge_estimator": "mp_quantile",
    "importance": "variance",
    "schedule": "layerwise",
    "teacher": "previous",
    "hidden_weight": 0.0,
    "sample_unit": "token",
    "refit": False,
}
RANDOM_BASIS = {"basis": "random", "allocation": "uniform"}


def quantile_for(model: PreTrainedModel, dataloader: Iterable, recipe: RMTKDConfig) -> float:
    """The smallest tau, in steps of 0.05 from 0.5, whose edges reach the target, all sites at once: the paper's rule
    at the size of the other arms."""
    surgeon = Surgeon(model, dataloader, recipe, progress=False)
    size = parameters_of(surgeon.teacher, surgeon.anatomy)
    for tau in (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95):
        surgeon.config = recipe.replace(tau=tau, target_reduction=None)
        surgeon.subspaces.clear()
        if size(surgeon.plan()[0]) <= (1 - recipe.target_reduction) * count_parameters(model):
            return tau
    raise SystemExit(f"No quantile reaches a reduction of {recipe.target_reduction}.")


def distil_untrained(
    student: PreTrainedModel, teacher: PreTrainedModel, args: TrainingArguments, recipe: RMTKDConfig, **data: Any
) -> RMTKDTrainer:
    """The architecture of `student` from random weights, distilled from `teacher` on its answers; without dropout, as
    after a cut. Returns the trainer, done."""
    student.config.hidden_dropout_prob = student.config.attention_probs_dropout_prob = 0.0
    trainer = RMTKDTrainer(
        type(student)(student.config),
        args,
        teacher_model=teacher,
        rmtkd_config=recipe.replace(target_reduction=None, schedule="none"),
        objectives={"task": {"weight": recipe.task_weight}, "kl": {"weight": recipe.kl_weight}},
        **data,
    )
    trainer.train()
    return trainer
