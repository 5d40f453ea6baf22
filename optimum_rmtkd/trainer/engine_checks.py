"""What of DeepSpeed does not work with cuts is refused by name, before anything is cut or trained. Knows its
configuration and its checkpoints; no trainer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import RMTKDError


__all__ = ["check_engine_config", "check_written_by", "partitions_in"]

STAGES = (1, 2, 3)
KNOWN = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "bf16",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
}
KNOWN_ZERO = {
    "stage",
    "overlap_comm",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "allgather_partitions",
    "allgather_bucket_size",
    "round_robin_gradients",
    "sub_group_size",
    "memory_efficient_linear",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
}
KNOWN_BF16 = {"enabled"}
WHY = {
    "optimizer": "a cut makes a new optimizer as the training arguments say. Leave it out: optim, learning_rate, "
    "weight_decay and adam_* say the same",
    "scheduler": "the learning rate follows the cuts. Leave it out: lr_scheduler_type and warmup_steps say the same",
    "fp16": "its loss scale is not known to what is trained beside the model. Take bf16, or fp32",
    "zero_optimization.offload_optimizer": "cuts with partitions in another memory are not tested. Leave it out",
    "zero_optimization.offload_param": "cuts with partitions in another memory are not tested. Leave it out",
}
UNKNOWN = "what it means for a cut inside training is not known here. Leave it out"
ELSE = "or cut first with optimum_rmtkd.narrow and train the result with transformers' own Trainer"
OPTIMIZERS, WEIGHTS_3 = "*zero_pp_rank_*_optim_states.pt", "*zero_pp_rank_*_model_states.pt"
_RANK = re.compile(r"zero_pp_rank_(\d+)_")


def check_engine_config(config: Mapping[str, Any]) -> None:
    """Is a configuration of DeepSpeed one that cuts work with?

    Raises:
        RMTKDError: another stage of ZeRO than 1 to 3, or an entry that is not known to work; names it.
    """
    zero, half = config.get("zero_optimization") or {}, config.get("bf16") or {}
    stage = zero.get("stage", 0)
    if stage not in STAGES:
        raise RMTKDError(
            f"DeepSpeed with zero_optimization.stage={stage!r}; expected 1, 2 or 3. Set one of them, or use DDP "
            "(without deepspeed)."
        )
    found = list(_unknown(config, KNOWN)) + [f"zero_optimization.{name}" for name in _unknown(zero, KNOWN_ZERO)]
    found += [f"bf16.{name}" for name in _unknown(half, KNOWN_BF16)]
    if found:
        raise RMTKDError(
            f"DeepSpeed's {', '.join(found)} does not work with cuts inside training: "
            f"{WHY.get(found[0], UNKNOWN)}, {ELSE}."
        )


def _unknown(config: Mapping[str, Any], known: set[str]) -> Iterator[str]:
    return (name for name, value in config.items() if name not in known and not _off(value))


def _off(value: Any) -> bool:
    """Whether an entry asks for nothing."""
    if isinstance(value, Mapping):
        return value.get("enabled", None) is False or value.get("device") == "none" or all(map(_off, value.values()))
    return value is None or value is False or value == "none"


def partitions_in(folder: str | Path) -> set[int]:
    """Numbers of the processes whose part of the optimizer's state lies in a checkpoint, on the disk of this one."""
    states = _states_in(folder)
    names = [] if states is None else [path.name for path in states.glob(OPTIMIZERS)]
    return {int(match[1]) for name in names if (match := _RANK.search(name))}


def _states_in(folder: str | Path) -> Path | None:
    """Where DeepSpeed's own files lie; None in a checkpoint that it did not write."""
    return next(iter(sorted(Path(folder).glob("global_step*"))), None)


def check_written_by(
    folder: str | Path, stage: int | None, processes: int, partitions: Collection[int] | None = None
) -> None:
    """Can the optimizer's state in a checkpoint be read in this run? DeepSpeed's lies in the partitions of one number
    of processes and one kind of stage.

    Args:
        stage: of ZeRO in this run; None without DeepSpeed.
        partitions: `partitions_in` it, together on all machines, which may have disks of their own. None: on this one.

    Raises:
        RMTKDError: it cannot; says how it was written, or whose partitions are missing.
    """
    states = _states_in(folder)
    if states is None and stage is None:
        return
    if states is None:
        raise _other(folder, "without DeepSpeed", f"under DeepSpeed (ZeRO-{stage})", processes)
    found = partitions_in(folder) if partitions is None else set(partitions)
    count, third = max(found, default=-1) + 1, any(states.glob(WEIGHTS_3))
    if missing := sorted(set(range(count)) - found):
        raise RMTKDError(
            f"{folder} lacks the partitions of process(es) {', '.join(map(str, missing))} of at least {count}, on all "
            "machines of this run: expected those of all. Copy them from the machines where they were written, or "
            "resume from another checkpoint."
        )
    kind = f"under DeepSpeed (ZeRO-{'3' if third else '1 or 2'}) with {count} processes"
    if stage is None:
        raise _other(folder, kind, "without it", processes)
    if count != processes or third != (stage == 3):
        raise _other(folder, kind, f"under ZeRO-{stage}", processes)


def _other(folder: str | Path, written: str, read: str, processes: int) -> RMTKDError:
    return RMTKDError(
        f"{folder} was written {written}, and this run is {read} with {processes}: the optimizer's state in it cannot "
        "be read so. Continue as it was written, or start a new run with its model."
    )
