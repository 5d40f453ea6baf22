"""What a loop cannot work with is refused when it is made. Knows Accelerate, no run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ...config import COMPARING, RMTKDConfig
from ...errors import RMTKDError
from ..sharding_checks import one_device, unsharded


__all__ = [
    "check_accelerator",
    "check_batch",
    "check_evaluation",
    "check_loader",
    "check_model_is_whole",
    "check_prepared",
    "check_steps",
    "one_loss",
    "recipe_of",
]

logger = logging.getLogger(__name__)

SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
OF_THE_SCRIPT = "model and optimizer have to be prepared together after a cut, and here they are the script's own"
PREPARE = "model, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(...)"


def recipe_of(given: Any) -> RMTKDConfig:
    """The recipe that is given, or the default one.

    Raises:
        RMTKDError: something else.
    """
    return RMTKDConfig.taken(given, "rmtkd_config")


def check_steps(max_steps: Any) -> None:
    """Raises:
    RMTKDError: no number of optimizer steps.
    """
    if not isinstance(max_steps, int) or isinstance(max_steps, bool) or max_steps < 1:
        raise RMTKDError(
            f"max_steps={max_steps!r}; expected the number of optimizer steps in the whole run, over which the cuts "
            "are spread."
        )


def check_evaluation(config: RMTKDConfig, evaluate: Any, metric: str | None) -> None:
    """Raises:
    RMTKDError: no function, or none where a metric is named or compared.
    """
    if evaluate is not None and not callable(evaluate):
        raise RMTKDError(
            f"evaluate is a {type(evaluate).__name__}; expected a function without arguments that returns the metrics "
            "by name: evaluate=lambda: evaluate(model)."
        )
    compared = [name for name in COMPARING if getattr(config, name) is not None]
    compared += ["metric_for_best_model"] if metric is not None else []
    if evaluate is None and compared:
        raise RMTKDError(f"{compared[0]} is about validation metrics; expected evaluate=, got none. Pass it.")


def check_accelerator(accelerator: Any) -> None:
    """Raises:
    RMTKDError: no Accelerator, or one that shards the parameters.
    """
    from accelerate import Accelerator

    if not isinstance(accelerator, Accelerator):
        raise RMTKDError(
            f"RMTKDLoop got a {type(accelerator).__name__} first; expected the script's Accelerator: "
            "RMTKDLoop(accelerator, model, optimizer, train_dataloader, lr_scheduler, ...)."
        )
    if (kind := accelerator.distributed_type.name) in SHARDED:
        raise unsharded(kind.replace("_", "-"), OF_THE_SCRIPT)


def check_prepared(accelerator: Any, model: Any, optimizer: Any) -> None:
    """Raises:
    RMTKDError: a model or an optimizer that this accelerator has not prepared, or that do not belong together.
    """
    inner = accelerator.unwrap_model(model)
    known = any(accelerator.unwrap_model(other) is inner for other in accelerator._models)
    if not known or not getattr(model, "_is_accelerate_prepared", False):
        how = "it is the inside of one that was: pass what prepare returned" if known else f"expected {PREPARE} first"
        raise RMTKDError(f"{type(model).__name__} was not prepared by this accelerator; {how}.")
    if not any(known is optimizer for known in accelerator._optimizers):
        raise RMTKDError(
            f"The optimizer ({type(optimizer).__name__}) was not prepared by this accelerator; expected {PREPARE} "
            "first, and the optimizer that it returned."
        )
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise RMTKDError(
            f"The optimizer ({type(optimizer.optimizer).__name__}) holds no parameter of {type(model).__name__}; "
            "expected the one that trains it."
        )
    _check_one_optimizer(accelerator, model, optimizer)


def _check_one_optimizer(accelerator: Any, model: nn.Module, optimizer: Any) -> None:
    """A cut gives new parameters to one optimizer.

    Raises:
        RMTKDError: another one holds parameters of this model as well.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for other in accelerator._optimizers:
        held = [names[id(p)] for group in other.param_groups for p in group["params"] if id(p) in names]
        if other is not optimizer and held:
            raise RMTKDError(
                f"{held[0]} and {len(held) - 1} more of {type(model).__name__} are trained by an optimizer "
                f"({type(other.optimizer).__name__}) beside the one given; expected one for the whole model: a cut "
                "would leave behind what the other trains. Give one optimizer several parameter groups, each with its "
                "rate; after an attempt before this one (a smaller batch), call accelerator.free_memory() first."
            )
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if left := [name for place, name in names.items() if place not in own]:
        logger.warning(
            "%s and %d more trainable parameters are in no optimizer: they stay as they are, before and after the "
            "cuts. Add them to the optimizer, or freeze them (requires_grad=False).",
            left[0],
            len(left) - 1,
        )


def check_model_is_whole(model: nn.Module) -> None:
    """Raises:
    RMTKDError: a model whose tensors lie on several devices or processes.
    """
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        raise one_device(len(devices))
    if any(type(parameter.data).__name__ == "DTensor" for parameter in model.parameters()):
        raise unsharded("Tensor parallelism")


def check_loader(loader: Any) -> None:
    """Raises:
    RMTKDError: no DataLoader: the cuts are calibrated on its rows.
    """
    if not isinstance(loader, torch.utils.data.DataLoader):
        raise RMTKDError(
            f"train_dataloader is a {type(loader).__name__}; expected the DataLoader that accelerator.prepare "
            "returned: the cuts are calibrated on its rows, through its collate_fn."
        )


def check_batch(batch: Any) -> None:
    """Raises:
    RMTKDError: a batch that is no dictionary, or a step without gradients.
    """
    if not isinstance(batch, Mapping):
        raise RMTKDError(
            f"loop.loss got a {type(batch).__name__}; expected a batch as the model takes it, a dictionary: "
            "loop.loss(batch) stands for model(**batch).loss."
        )
    if not torch.is_grad_enabled():
        raise RMTKDError(
            "loop.loss was called without gradients: it is the loss of a training step, and makes the cuts that are "
            "due. Evaluate with model(**batch)."
        )


def one_loss(loss: Any, label_names: Iterable[str], batch: Mapping[str, Any], own: bool) -> torch.Tensor:
    """The task's loss, if it is one.

    Args:
        own: it comes from the user's `task_loss`.

    Raises:
        RMTKDError: none, or no scalar tensor.
    """
    if torch.is_tensor(loss) and not loss.dim():
        return loss
    got = f"a tensor {tuple(loss.shape)}" if torch.is_tensor(loss) else type(loss).__name__
    if own:
        raise RMTKDError(f"task_loss(outputs, batch) returned {got}; expected a scalar tensor, the batch's mean.")
    raise RMTKDError(
        f"The model's outputs hold no loss ({got}) for a batch with {', '.join(batch)}: expected "
        f"{' or '.join(label_names)} among them. Give labels, pass task_loss=, or leave TaskLoss out of the "
        "objectives to distil on unlabelled data."
    )
