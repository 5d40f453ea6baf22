"""FSDP2 on CPUs, for launched scripts: torch has it, with gloo; Accelerate offers it to accelerators alone.

Import this before anything makes an Accelerator.
"""

from __future__ import annotations

import os

import accelerate.state
import torch.distributed
from accelerate.utils import DistributedType


def open_the_door() -> None:
    """Accelerate takes the CPUs of several processes for accelerators."""
    usual = accelerate.state.PartialState.__init__

    def init(self, cpu=False, **options):
        usual(self, cpu, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    accelerate.state.PartialState.__init__ = init


def zero(stage: int, **entries) -> dict:
    """A configuration of DeepSpeed that follows the training arguments."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    batches = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    values = {"zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}}
    return dict.fromkeys((*batches, "gradient_clipping"), "auto") | values | {"bf16": {"enabled": "auto"}} | entries


def join() -> None:
    """DeepSpeed knows of the other processes, as it does on accelerators once training arguments are made: on CPUs
    Accelerate tells torch alone."""
    from deepspeed import init_distributed

    init_distributed(dist_backend="gloo")


def options(**config) -> dict:
    """Training arguments that shard a BERT."""
    return {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"], **config}}


def whole(model) -> dict[str, torch.Tensor]:
    """Its tensors on every process."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}


def tensors(model) -> dict[str, torch.Tensor]:
    """The same, of a model that a run holds in whatever way. Collective."""
    from optimum_rmtkd.trainer.swap import whole as made_whole

    return whole(made_whole(model))
