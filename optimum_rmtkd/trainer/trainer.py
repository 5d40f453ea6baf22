"""The trainers that are shipped: each is one of transformers' own behind `RMTKDMixin`."""

from __future__ import annotations

from transformers import Seq2SeqTrainer, Trainer

from .arguments import RMTKDTrainingArguments
from .mixin import RMTKDMixin


__all__ = ["RMTKDSeq2SeqTrainer", "RMTKDTrainer"]


class RMTKDTrainer(RMTKDMixin, Trainer):
    """Drop-in for `transformers.Trainer`: trains, and narrows the model on the way as the recipe says. Its arguments
    are those of `RMTKDMixin`, and those of `Trainer`."""

    def __init__(self, model=None, args=None, *positional, **kwargs):
        super().__init__(model, args or RMTKDTrainingArguments("tmp_trainer"), *positional, **kwargs)


class RMTKDSeq2SeqTrainer(RMTKDMixin, Seq2SeqTrainer):
    """The same for `transformers.Seq2SeqTrainer`, with `Seq2SeqTrainingArguments`: summarization, translation."""
