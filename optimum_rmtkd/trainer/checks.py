"""What cannot work is refused before anything is cut or trained. Knows models, recipes and batches; no trainer."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from ..batches import from_loader, no_mapping
from ..config import COMPARING, RMTKDConfig
from ..distillation import CachedTeacher, KLDivergence, TaskLoss
from ..distillation.cached import COLUMNS
from ..distillation.objectives.answers import has_head
from ..distillation.signatures import named_inputs
from ..errors import CalibrationError, RMTKDError, UnsupportedArchitectureError
from ..models import AROUND_THE_RESULT, check_kind, check_structure
from . import plain
from .host import Host
from .labels import check_labels
from .rehearsal import outputs_on, rehearse
from .run import Run


__all__ = [
    "check_data",
    "check_first_batch",
    "check_given",
    "check_rows",
    "check_length",
    "check_model",
    "check_own_loss",
    "check_parts",
    "check_steps",
    "check_wrapped",
    "cuts_stream",
]

logger = logging.getLogger(__name__)


UNLABELLED = "objectives=[KLDivergence()], with from optimum_rmtkd.objectives import KLDivergence"


class Checked(Protocol):
    """A trainer whose data can be looked at before it trains."""

    def check_first_batch(self) -> None:
        """What its first step would say of the data."""


def check_given(model: Any) -> None:
    """What was passed as the model of a trainer of transformers, before that trainer moves it to a device.

    Raises:
        RMTKDError: no module: the name of one, its class, a pipeline.
    """
    if model is not None and not isinstance(model, nn.Module):
        check_kind(model)


def check_steps(args: Any) -> None:
    """Is anything trained at all?

    Raises:
        RMTKDError: no epochs and no steps.
    """
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise RMTKDError(
            f"num_train_epochs={args.num_train_epochs:g} and max_steps={args.max_steps}: no step would be trained, "
            "and a cut needs steps of distillation behind it. Set num_train_epochs=3, for example; for a cut without "
            "training use optimum_rmtkd.narrow."
        )


def check_model(model: nn.Module, recipe: RMTKDConfig, evaluated: bool) -> None:
    """Recipe and model.

    Args:
        evaluated: there is an eval_dataset.

    Raises:
        RMTKDError: a recipe that needs an eval_dataset.
        UnsupportedArchitectureError: no family is known for a model that is to be cut, or its class and config do not
            describe it.
    """
    from .. import surgery

    wanted = [name for name in COMPARING if getattr(recipe, name) is not None]
    if wanted and not evaluated:
        raise RMTKDError(f"{wanted[0]} compares validation metrics; expected an eval_dataset, got none. Pass one.")
    if not hasattr(model, "config"):
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} is no transformers PreTrainedModel; expected one with a config. "
            f"{AROUND_THE_RESULT}."
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


def cuts_stream(model: nn.Module, recipe: RMTKDConfig) -> bool:
    """Whether the recipe narrows what the model gives: its residual stream."""
    from .. import surgery
    from ..surgery.sites import select_sites

    if recipe.schedule == "none":
        return False
    return any(site.kind == "hidden" for site in select_sites(surgery.anatomy_of(model, recipe), recipe.sites))


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


def check_parts(run: Run, model: nn.Module) -> None:
    """Do objectives and transforms fit the model and its teacher?

    Raises:
        RMTKDError: one of them does not, with the reason; or it cannot say its arguments.
    """
    given, objectives = run.tutor.given, run.tutor.objectives
    teacher = model if given is None else given.model
    blocks = [name for name in run.config.sites or () if name == "block" or name.endswith(".block")]
    for objective in objectives if blocks else ():
        if isinstance(getattr(objective, "layers", None), Mapping):
            raise RMTKDError(
                f"{type(objective).__name__} with a mapping of layers beside the site {blocks[0]!r}: which layer "
                "of the student a number or path means changes when blocks go. Use layers='uniform', which "
                "compares each block with the one it was made from, or layers='last'; or leave 'block' out of `sites`."
            )
    for part in (*objectives, *run.parts.transforms):
        part.check(model, teacher)
        part.to_dict()  # every checkpoint holds it
    if run.config.schedule == "none" and given is None and any(o.needs_teacher for o in objectives):
        logger.warning(
            "schedule='none' and no teacher_model: nothing is cut, and the model is distilled from itself as it is "
            "now. Pass teacher_model=."
        )


def check_wrapped(run: Run, whole: str) -> None:
    """The batches of a library's own model stay as its loss wants them.

    Args:
        whole: class of the model around the narrowed one.

    Raises:
        RMTKDError: a transform, or answers that lie in the rows.
    """
    changed = [type(transform).__name__ for transform in run.parts.transforms]
    if isinstance(run.tutor.given, CachedTeacher):
        changed.append(type(run.tutor.given).__name__)
    if changed:
        raise RMTKDError(
            f"{', '.join(changed)} works on the batches of a model that is trained by itself; those of {whole} belong "
            "to its own loss. Leave it out, or train the transformer inside with RMTKDTrainer."
        )


def check_own_loss(compute_loss: Callable, owner: str, run: Run) -> None:
    """Distillation compares the outputs that the task's loss was computed from.

    Args:
        compute_loss: of the user's own, in a subclass `owner`.

    Raises:
        RMTKDError: it cannot return the outputs.
    """
    if not any(isinstance(objective, TaskLoss) for objective in run.tutor.objectives):
        logger.warning(
            "compute_loss of %s gives the task's term, and the objectives hold no TaskLoss: it will not be used in "
            "training. Set task_weight above 0, or add TaskLoss.",
            owner,
        )
    taken = inspect.signature(compute_loss).parameters
    if "return_outputs" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise RMTKDError(
            f"compute_loss({', '.join(taken)}) of {owner} does not take return_outputs; expected "
            "compute_loss(model, inputs, return_outputs=False, **kwargs) that returns (loss, outputs) if it is true. "
            "Distillation and evaluation need the outputs."
        )


def check_data(dataset: Any, own_loader: bool = False) -> None:
    """Is there training data?

    Args:
        own_loader: a subclass makes the loader: it may take several sets, or know of its data by itself.

    Raises:
        RMTKDError: no training data, none in it, or splits in place of rows.
    """
    if dataset is None and own_loader:
        return
    if dataset is None:
        raise RMTKDError(
            "train() without train_dataset: it is needed to calibrate the cuts and to distil. Pass train_dataset "
            "to RMTKDTrainer, or use optimum_rmtkd.narrow for a single cut without training."
        )
    if isinstance(dataset, Mapping) and not own_loader:
        raise RMTKDError(
            f"train_dataset is a {type(dataset).__name__} with "
            f"{', '.join(map(str, list(dataset)[:6]))}: expected rows. Pass one split of it."
        )
    if hasattr(dataset, "__len__") and not len(dataset):
        raise RMTKDError("train_dataset is empty; expected rows to calibrate the cuts and to distil on.")


def check_first_batch(trainer: Checked) -> None:
    """Look at the first rows of a trainer's data as `train()` will do: for a script that wants to fail before it
    queues for a machine.

    Args:
        trainer: an `RMTKDTrainer`, or another trainer with `RMTKDMixin` in front.

    Raises:
        RMTKDError: as `check_rows`.
    """
    trainer.check_first_batch()


def check_rows(run: Run, samples: int, labels_needed: bool, classes_known: bool) -> None:
    """Does the data hold what the objectives read? What one process lacks stops all of them.

    Args:
        samples: how many to look at.
        labels_needed: the task's loss needs labels, by the names that the host knows.
        classes_known: it is the model's own, so that a class has to be one of the model's.

    Raises:
        RMTKDError: nothing to train, too few rows, no labels for the task loss, no cached answers for a
            `CachedTeacher`, or no answers that a term could compare.
        CalibrationError: weights that are not finite; data that no cut can be calibrated with.
        BudgetError: a target that the model already meets, or that no widths can give, in however many cuts.
    """
    from .. import surgery
    from ..surgery.processes import from_main, one_for_all

    host, recipe = run.host, run.config
    model, processes = plain.plain(host.model), host.accelerator.num_processes
    if not any(p.requires_grad for p in model.parameters()):
        raise RMTKDError(
            f"Every parameter of {type(model).__name__} is frozen, and there is nothing to train: expected "
            "some with requires_grad. A merged adapter leaves its model frozen; call model.requires_grad_(True)."
        )
    if run.plan is not None:  # trained on after its cuts: the targets are met
        recipe = recipe.without_targets()
    elif recipe.schedule != "none":
        surgery.check_recipe(model, recipe)
    terms = list(run.tutor.objectives)
    with one_for_all(host.accelerator):
        batches = host.calibration_batches(max(samples, processes), strip=False)
        if not len(batches):
            raise RMTKDError(
                f"train_dataset has fewer rows than the {processes} processes of this run; expected at "
                "least one for each. Use fewer processes, or more data."
            )
        batch = next(from_loader(batches))
        if not isinstance(batch, Mapping):
            raise CalibrationError(no_mapping(batch))
        _check_batch(run, model, batch, labels_needed, classes_known)
        if recipe.schedule != "none":
            surgery.check_data(model, [host.columns.for_calibration(batch)], recipe)
            if host.accelerator.is_main_process:  # several at once would disturb each other's measurements
                surgery.check_latency(model, recipe)
        rehearse(run, model, batch)  # what is wrong with the data has been said by now
    kept = from_main([objective.label for objective in run.tutor.objectives], host.accelerator)
    run.tutor.objectives[:] = [objective for objective in terms if objective.label in kept]
    if recipe.schedule != "none":  # now, and not after hours of fine-tuning
        surgery.check_variety(_few_then_all(host, max(samples, processes)), host.accelerator)


def _few_then_all(host: Host, few: int) -> Iterator[Mapping[str, Any]]:
    """Batches of the calibration: a few samples, seldom alike, and then all of them."""
    yield from host.calibration_batches(few)
    yield from host.calibration_batches()


def _check_batch(
    run: Run, model: nn.Module, inputs: Mapping[str, Any], labels_needed: bool, classes_known: bool
) -> None:
    host, tutor = run.host, run.tutor
    missing = [name for name in COLUMNS if name not in inputs]
    if isinstance(tutor.given, CachedTeacher) and missing:
        raise RMTKDError(
            f"The batch has no {', '.join(missing)}: expected training data from cache_answers(teacher, dataset, ...)."
        )
    needed = any(isinstance(objective, TaskLoss) for objective in tutor.objectives)
    if needed and labels_needed and not any(name in inputs for name in host.label_names):
        if _is_unlabelled_text(run, model):
            _leave_to_the_teacher(run)
        else:
            _check_loss(run, model, inputs)
    if classes_known:
        check_labels(host.model, inputs)
    run.loss.look_at_labels(host.model, [inputs])
    _check_segments(tutor.given, host.model, inputs)


def _is_unlabelled_text(run: Run, model: nn.Module) -> bool:
    """Are the terms of the loss the recipe's own choice, for a language model that is not to be fine-tuned first?"""
    language = has_head(model, "CAUSAL_LM") or has_head(model, "MASKED_LM")
    language = language and not getattr(model.config, "is_encoder_decoder", False)  # BART is among the masked ones
    return language and not run.parts.named and not run.config.fit_share and bool(run.config.kl_weight)


def _leave_to_the_teacher(run: Run) -> None:
    """Without labels the task has no term, and the teacher's answers weigh 1."""
    tutor = run.tutor
    tutor.objectives = [o for o in tutor.objectives if not isinstance(o, TaskLoss)]
    for objective in tutor.objectives:
        if isinstance(objective, KLDivergence):
            objective.weight = 1.0
    logger.warning(
        "The text has no labels: the task's loss is left out, and the teacher's answers weigh 1. Terms: %s.",
        ", ".join(objective.label for objective in tutor.objectives),
    )


def _check_loss(run: Run, model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """The task's loss of a batch in which nothing is known as a label."""
    names, cure = list(run.host.label_names), f"leave the task's loss out to distil on unlabelled data: {UNLABELLED}"
    if names:
        raise RMTKDError(
            f"The task loss needs {' or '.join(names)}; the batch holds {', '.join(inputs)}. Give labels, or {cure}."
        )
    outputs = outputs_on(run, model, inputs)  # some models call what they learn from by other names (bool_masked_pos)
    if not isinstance(outputs, Mapping) or outputs.get("loss") is None:
        returned = ", ".join(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise RMTKDError(
            f"{type(run.host.model).__name__} returns no loss on a batch of {', '.join(inputs)}, but {returned}; "
            f"expected a task loss. Give what it is computed from, name its labels (label_names), or {cure}."
        )


def _check_segments(given: Any, model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """A pair of texts is one text to a teacher that is not told which is which."""
    name = "token_type_ids"
    for teacher in [] if given is None or name in inputs or name in named_inputs(model) else given.models:
        kinds = getattr(getattr(teacher, "config", None), "type_vocab_size", None) or 1
        if kinds > 1 and name in named_inputs(teacher):
            logger.warning(
                "%s, a teacher, tells the two texts of a pair apart by token_type_ids, and the training data has "
                "none. For pairs of texts tokenize with return_token_type_ids=True; the student does not see them.",
                type(teacher).__name__,
            )
            return
