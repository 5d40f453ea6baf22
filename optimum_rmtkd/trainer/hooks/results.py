"""Hooks of the model card, and what a run leaves in the output folder for it."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path

from ...hub import write_card, write_results
from ...hub.card import CARD, is_foreign
from ...hub.run import first, public_name


__all__ = ["ResultHooks"]

logger = logging.getLogger(__name__)

CARD_OPTIONS = ("language", "license", "tags", "model_name", "finetuned_from", "tasks")
CARD_OPTIONS += ("dataset_tags", "dataset", "dataset_args")  # of `Trainer.create_model_card`


class ResultHooks:
    """In front of a trainer: the card of a reduced model."""

    def create_model_card(self, *positional, **kwargs) -> None:
        """As the trainer's own, with the card of a reduced model: sizes, stages, figures, recipe."""
        if not self.is_world_process_zero():
            return
        host = self._host
        if not host.run.stages or host.inside.wraps:  # an ordinary model, or one whose library writes its card
            super().create_model_card(*positional, **kwargs)
            return
        asked = inspect.signature(super().create_model_card).bind(*positional, **kwargs).arguments
        asked |= asked.pop("kwargs", {})
        language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args = (
            asked.get(name) for name in CARD_OPTIONS
        )
        dataset = dataset or asked.get("dataset_name")  # TRL's word for it
        given = [first(values) for values in (dataset_tags, dataset, dataset_args)]
        if is_foreign(self.args.output_dir):
            logger.warning("%s was written or changed by somebody else; it stays.", Path(self.args.output_dir) / CARD)
            return
        if any(given):
            known = {"id": given[0] or given[1], "name": given[1] or given[0], "config": given[2]}
            write_results(self.args.output_dir, dataset=known | {"on_hub": given[0] is not None})
        live = type(host.model)
        write_results(
            self.args.output_dir,
            base_model=finetuned_from,
            architecture=live.__name__,
            auto_class=live._auto_class or "",  # "": a stock class, which needs none of ours
        )
        kept = getattr(self._host.run.initial, "model_tags", None) or []  # a cut makes a new model, without them
        tags = [*([tags] if isinstance(tags, str) else tags or []), *kept]
        metadata = {"language": language, "license": license, "tags": tags, "pipeline_tag": first(tasks)}
        write_card(self.args.output_dir, self.hub_model_id or model_name, **metadata)

    def _write_results(self, before: int, after: int) -> None:
        options = {"epochs": self.args.num_train_epochs, "batch_size": self.args.per_device_train_batch_size}
        same = ("max_steps", "gradient_accumulation_steps", "learning_rate", "weight_decay", "warmup_steps", "bf16")
        options |= {name: getattr(self.args, name) for name in same}
        write_results(
            self._host.folder,
            base_model=public_name(self._host.run.initial.config._name_or_path),
            parameters=(before, after),
            log_history=self.state.log_history,
            training=options,
            recipe=self.rmtkd_config.to_dict(),
        )
