"""Ways of spreading a model over devices that cannot be cut inside training are refused by name, before anything is
cut or trained. Knows Accelerate's state and training arguments; no trainer."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..distillation import OnPolicy
from ..errors import RMTKDError
from .engine_checks import check_engine_config


__all__ = ["check_sharding", "check_sharding_arguments", "one_device", "unsharded"]

FSDP1 = "it flattens them into one tensor, which a cut cannot take apart; FSDP2 keeps each by itself"


def one_device(count: int) -> RMTKDError:
    """The refusal of several devices in one process."""
    return RMTKDError(
        f"{count} devices in one process (DataParallel or a device map): expected one device a process. "
        "Launch with torchrun --nproc_per_node, or show the process one device (CUDA_VISIBLE_DEVICES=0)."
    )


def unsharded(what: str, why: str = "a cut inside training needs whole ones on every process") -> RMTKDError:
    """The refusal of a way of sharding.

    Args:
        why: it cannot be cut inside training.
    """
    return RMTKDError(
        f"{what} shards the parameters; {why}. Use FSDP2 (fsdp=True, fsdp_config={{'version': 2}}), DeepSpeed (ZeRO) "
        "or DDP (torchrun) with RMTKDTrainer, or cut first with optimum_rmtkd.narrow and train the result sharded "
        "with transformers' own Trainer."
    )


def check_sharding_arguments(args: Any) -> None:
    """Is sharding asked for that cannot be?

    Args:
        args: training arguments, before anything is built from them.

    Raises:
        RMTKDError: FSDP1 or that of XLA.
    """
    if not getattr(args, "fsdp", None):
        return
    plugin = getattr(args, "fsdp_plugin_args", None)
    if plugin is None:
        raise unsharded("fsdp", "FSDP of XLA, or without a configuration of torch's, is not known here")
    if plugin.get("fsdp_version") != 2:
        raise unsharded(f"fsdp (version {plugin.get('fsdp_version')})", FSDP1)


def check_sharding(accelerator: Any, args: Any, model: nn.Module, reparameterization: Any, transforms: list) -> None:
    """The same, once Accelerate has said what it makes of it, and whether the parts of the run work sharded.

    Raises:
        RMTKDError: they do not; names the part and why.
    """
    state = accelerator.state
    plugin, kind = getattr(state, "fsdp_plugin", None), accelerator.distributed_type.name
    if (engine := getattr(state, "deepspeed_plugin", None)) is not None:
        check_engine_config(engine.deepspeed_config)
        _check_parts_held("DeepSpeed", accelerator, args, model, reparameterization, transforms)
        return
    if getattr(args, "deepspeed", None):
        raise unsharded("deepspeed", f"Accelerate has made {kind} of it here")
    if any(type(parameter.data).__name__ == "DTensor" for parameter in model.parameters()):
        raise RMTKDError(
            f"The parameters of {type(model).__name__} lie in shards already; expected a plain one, which the trainer "
            "shards itself. Load it without tp_plan and distributed_config, or from what save_model wrote."
        )
    if plugin is None:
        if getattr(args, "fsdp", None):
            raise unsharded("fsdp", f"Accelerate has made {kind} of it here: it has FSDP on accelerators alone")
        return
    if plugin.fsdp_version != 2:
        raise unsharded(f"fsdp (version {plugin.fsdp_version})", FSDP1)
    from torch.distributed.fsdp import CPUOffloadPolicy

    refused = {
        "cpu_ram_efficient_loading=True": plugin.cpu_ram_efficient_loading
        and "the other processes have no weights yet when the first batch is looked at. Set it False",
        "cpu_offload=True": isinstance(plugin.cpu_offload, CPUOffloadPolicy)
        and "batches and parameters would lie on different devices while a cut is made. Set it False",
    }
    _check_parts_held("FSDP2", accelerator, args, model, reparameterization, transforms, refused)


def _check_parts_held(how, accelerator, args, model, reparameterization, transforms, refused=None) -> None:
    """What does not work where the processes hold a model together, in whatever way.

    Args:
        how: they hold it.
        refused: {what: why, or False}, of that way alone.
    """
    if getattr(accelerator, "parallelism_config", None) is not None:
        raise unsharded("parallelism_config", f"only {how} over all processes is known here")
    refused = {
        **(refused or {}),
        "torch_compile=True": getattr(args, "torch_compile", False)
        and "what is compiled cannot take over another architecture shard by shard. Set it False",
        "auto_find_batch_size=True": getattr(args, "auto_find_batch_size", False)
        and "the model cannot be taken back from them for a second attempt. Set it False",
        f"reparameterization={getattr(reparameterization, 'name', None)!r}": reparameterization is not None
        and "its cores would be sharded and could not be folded. Leave it out",
    }
    for transform in transforms:
        what = f"the transform {type(transform).__name__}"
        refused[what] = isinstance(transform, OnPolicy) and (
            "the processes generate texts of different lengths, and would wait for each other. Leave it out"
        )
    refused[f"a model of {type(model).__module__.partition('.')[0]}"] = not isinstance(model, PreTrainedModel) and (
        "layers around the transformer are not known to the sharding. Narrow the transformer first"
    )
    for what, why in refused.items():
        if why:
            raise RMTKDError(f"{what} does not work with cuts under {how}: {why}, or use DDP.")
