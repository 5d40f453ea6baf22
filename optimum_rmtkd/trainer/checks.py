"""What cannot work is refused before anything is cut or trained."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..batches import from_loader, main_input, no_mapping
from ..distillation import CachedTeacher, TaskLoss
from ..distillation.cached import COLUMNS
from ..distillation.signatures import named_inputs
from ..errors import CalibrationError, RMTKDError, UnsupportedArchitectureError
from ..models import check_structure
from .columns import for_calibration


if TYPE_CHECKING:
    from .trainer import RMTKDTrainer


__all__ = ["check_first_batch", "check_length", "check_parts", "check_setting", "unsharded"]

logger = logging.getLogger(__name__)


def check_setting(trainer: RMTKDTrainer) -> None:
    """Devices, recipe and model.

    Raises:
        RMTKDError: sharded parameters, several devices in one process, a recipe that needs an eval_dataset.
        UnsupportedArchitectureError: no family is known for a model that is to be cut, or its class and config do not
            describe it.
    """
    from .. import surgery

    args, recipe, model = trainer.args, trainer.rmtkd_config, trainer.model
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise unsharded("fsdp" if trainer.is_fsdp_enabled else "deepspeed")
    if args.n_gpu > 1 or trainer.is_model_parallel:
        raise RMTKDError(
            f"{args.n_gpu} devices in one process (DataParallel or a device map): expected one device a process. "
            "Launch with torchrun --nproc_per_node, or show the process one device (CUDA_VISIBLE_DEVICES=0)."
        )
    wanted = [name for name in ("stage_threshold", "max_metric_drop") if getattr(recipe, name) is not None]
    if wanted and trainer.eval_dataset is None:
        raise RMTKDError(f"{wanted[0]} compares validation metrics; expected an eval_dataset, got none. Pass one.")
    if not hasattr(model, "config"):
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} is no transformers PreTrainedModel; expected one with a config."
        )
    if recipe.schedule != "none":
        check_structure(model)
        surgery.anatomy_of(model, recipe)
    half = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.float16, torch.bfloat16}
    if half:
        logger.warning(
            "The model's weights are %s and would be trained in it: steps are rounded to its few digits. Load it with "
            "from_pretrained(..., dtype=torch.float32); bf16=True computes in bfloat16 all the same.",
            " and ".join(str(dtype).removeprefix("torch.") for dtype in half),
        )


def check_length(args: Any, train_dataset: Any = None, **others: Any) -> None:
    """The number of steps has to be known: the cuts are spread over them.

    Raises:
        RMTKDError: a stream of unknown length, and no `max_steps`.
    """
    from transformers.trainer_utils import has_length

    if train_dataset is not None and args.max_steps <= 0 and not has_length(train_dataset):
        raise RMTKDError(
            f"train_dataset ({type(train_dataset).__name__}) has no length and max_steps is {args.max_steps}; "
            "expected a number of steps, over which the cuts are spread. Set max_steps."
        )


def unsharded(what: str) -> RMTKDError:
    """The refusal of trainers that shard."""
    return RMTKDError(
        f"{what} shards the parameters; a cut inside training needs whole ones on every process. Use DDP (torchrun), "
        "or cut first with optimum_rmtkd.narrow and train the result sharded."
    )


def check_parts(trainer: RMTKDTrainer) -> None:
    """Do objectives and transforms fit the model and its teacher?

    Raises:
        RMTKDError: one of them does not, with the reason; or it cannot say its arguments.
    """
    given = trainer.staging.given_teacher
    teacher = trainer.model if given is None else given.model
    for part in (*trainer.objectives, *trainer.transforms):
        part.check(trainer.model, teacher)
        part.to_dict()  # every checkpoint holds it
    taught = any(objective.needs_teacher for objective in trainer.objectives)
    if trainer.overrides_loss and not any(isinstance(objective, TaskLoss) for objective in trainer.objectives):
        logger.warning(
            "compute_loss of %s gives the task's term, and the objectives hold no TaskLoss: it will not be used in "
            "training. Set task_weight above 0, or add TaskLoss.",
            type(trainer).__name__,
        )
    _check_own_loss(trainer)
    if trainer.rmtkd_config.schedule == "none" and given is None and taught:
        logger.warning(
            "schedule='none' and no teacher_model: nothing is cut, and the model is distilled from itself as it is "
            "now. Pass teacher_model=."
        )


def _check_own_loss(trainer: RMTKDTrainer) -> None:
    """Distillation compares the outputs that the task's loss was computed from."""
    if not trainer.overrides_loss:
        return
    taken = inspect.signature(trainer.compute_loss).parameters
    if "return_outputs" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise RMTKDError(
            f"compute_loss({', '.join(taken)}) of {type(trainer).__name__} does not take return_outputs; expected "
            "compute_loss(model, inputs, return_outputs=False, **kwargs) that returns (loss, outputs) if it is true. "
            "Distillation and evaluation need the outputs."
        )


def check_first_batch(trainer: RMTKDTrainer) -> None:
    """Does the data hold what the objectives read? What one process lacks stops all of them.

    Raises:
        RMTKDError: nothing to train, no data, splits in place of rows, no labels for the task loss, or no cached
            answers for a `CachedTeacher`.
        CalibrationError: weights that are not finite; data that no cut can be calibrated with.
        BudgetError: a target that the model already meets, or that no widths can give, in however many cuts.
    """
    from .. import surgery
    from ..surgery.processes import one_for_all

    if not any(p.requires_grad for p in trainer.model.parameters()):
        raise RMTKDError(
            f"Every parameter of {type(trainer.model).__name__} is frozen, and there is nothing to train: expected "
            "some with requires_grad. A merged adapter leaves its model frozen; call model.requires_grad_(True)."
        )
    if isinstance(trainer.train_dataset, Mapping):
        raise RMTKDError(
            f"train_dataset is a {type(trainer.train_dataset).__name__} with "
            f"{', '.join(map(str, list(trainer.train_dataset)[:6]))}: expected rows. Pass one split of it."
        )
    if hasattr(trainer.train_dataset, "__len__") and not len(trainer.train_dataset):
        raise RMTKDError("train_dataset is empty; expected rows to calibrate the cuts and to distil on.")
    recipe = trainer.rmtkd_config
    if trainer.staging.plan is not None:  # trained on after its cuts: the targets are met
        recipe = recipe.replace(target_reduction=None, target_flops=None)
    elif recipe.schedule != "none":
        surgery.check_recipe(trainer.cores.plain(), recipe)
    samples = max(trainer.args.per_device_eval_batch_size, trainer.args.world_size)
    with one_for_all(trainer.accelerator):
        batches = trainer.calibration_batches(strip=False, samples=samples)
        if not len(batches):
            raise RMTKDError(
                f"train_dataset has fewer rows than the {trainer.args.world_size} processes of this run; expected at "
                "least one for each. Use fewer processes, or more data."
            )
        batch = next(from_loader(batches))
        if not isinstance(batch, Mapping):
            raise CalibrationError(no_mapping(batch))
        _check_batch(trainer, batch)
        if trainer.rmtkd_config.schedule != "none":
            surgery.check_data(trainer.cores.plain(), [for_calibration(trainer, batch)], recipe)


def _check_batch(trainer: RMTKDTrainer, inputs: Mapping[str, Any]) -> None:
    missing = [name for name in COLUMNS if name not in inputs]
    if isinstance(trainer.staging.given_teacher, CachedTeacher) and missing:
        raise RMTKDError(
            f"The batch has no {', '.join(missing)}: expected training data from cache_answers(teacher, dataset, ...)."
        )
    needed = any(isinstance(objective, TaskLoss) for objective in trainer.objectives)
    without = trainer.can_return_loss or trainer.compute_loss_func is not None or trainer.overrides_loss
    if needed and not without and not any(name in inputs for name in trainer.label_names):
        raise RMTKDError(
            f"The task loss needs {' or '.join(trainer.label_names)}; the batch holds {', '.join(inputs)}. Give "
            "labels, or leave TaskLoss out of the objectives to distil on unlabelled data."
        )
    _check_classes(trainer, inputs)
    trainer.distiller.look_at_labels([inputs])
    _check_segments(trainer, inputs)


def _check_classes(trainer: RMTKDTrainer, inputs: Mapping[str, Any]) -> None:
    """One class a sample has to be one of the model's: torch would say so after the cut, without a name."""
    labels, sample = inputs.get("labels"), main_input(inputs)
    classes = getattr(trainer.model.config, "num_labels", None) or 0
    one_each = isinstance(labels, torch.Tensor) and labels.dim() == 1 and not labels.is_floating_point()
    if trainer.overrides_loss or trainer.compute_loss_func is not None or not one_each or classes < 2:
        return
    if sample is None or sample.dim() not in (2, 4):  # (batch, choices, length): the label is a choice
        return
    known = labels[labels != -100]
    lowest, highest = (int(known.min()), int(known.max())) if len(known) else (0, 0)
    if lowest < 0 or highest >= classes:
        raise RMTKDError(
            f"The labels of a batch go from {lowest} to {highest}; expected classes from 0 to {classes - 1}, as "
            f"{type(trainer.model).__name__} has {classes} (config.num_labels). Map the labels, or load the model "
            "with more of them."
        )


def _check_segments(trainer: RMTKDTrainer, inputs: Mapping[str, Any]) -> None:
    """A pair of texts is one text to a teacher that is not told which is which."""
    given, name = trainer.staging.given_teacher, "token_type_ids"
    for teacher in [] if given is None or name in inputs or name in named_inputs(trainer.model) else given.models:
        kinds = getattr(getattr(teacher, "config", None), "type_vocab_size", None) or 1
        if kinds > 1 and name in named_inputs(teacher):
            logger.warning(
                "%s, a teacher, tells the two texts of a pair apart by token_type_ids, and the training data has "
                "none. For pairs of texts tokenize with return_token_type_ids=True; the student does not see them.",
                type(teacher).__name__,
            )
            return
