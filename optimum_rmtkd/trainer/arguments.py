"""Training arguments: transformers' own, with the one default that a cut inside training needs and an option of
sharded runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..validation import check_fields


__all__ = ["RMTKDTrainingArguments"]


@dataclass
class RMTKDTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments`; what concerns the reduction itself lives in `RMTKDConfig`."""

    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={
            "help": "As in TrainingArguments, but off by default: every parameter of a reduced model takes part in "
            "the loss, and the search costs a pass over the graph at every step."
        },
    )

    shard_teacher: bool = field(
        default=True,
        metadata={
            "help": "Under FSDP2, shard the teacher as the student is. False keeps it whole on every process: faster, "
            "as its parameters are not gathered at every step, where it fits."
        },
    )

    def __post_init__(self):
        check_fields(self, names=RMTKDTrainingArguments.__annotations__)  # the others are transformers' own
        super().__post_init__()
