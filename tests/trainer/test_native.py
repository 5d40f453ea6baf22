"""A run whose model stays one of a stock class, with a plain config, whatever is cut."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from optimum_rmtkd.hub.run import Run
from optimum_rmtkd.surgery import count_parameters


RECIPE = {"target_reduction": 0.6, "rounds": 2, "stage_share": 0.5, "shape": "native"}  # cuts at steps 0 and 3 of 6


def test_training_ends_with_a_plain_model(make_trainer, tmp_path):
    trainer = make_trainer(recipe=RECIPE, max_steps=6, save_strategy="steps", save_steps=3)
    whole = count_parameters(trainer.model)
    trainer.train()
    assert type(trainer.model) is BertForSequenceClassification
    assert [stage.accepted for stage in trainer.stages] == [True, True]
    assert 0.6 <= 1 - count_parameters(trainer.model) / whole < 0.7
    trainer.save_model(tmp_path / "saved")
    for folder in (tmp_path / "saved", Path(trainer.args.output_dir) / "checkpoint-6"):
        said = json.loads((folder / "config.json").read_text())
        assert said["model_type"] == "bert" and not {"rmtkd", "auto_map"} & set(said)
        assert not list(folder.glob("*.py"))
        again = AutoModelForSequenceClassification.from_pretrained(folder)
        ours = trainer.model.state_dict()
        assert all(torch.equal(tensor, ours[name]) for name, tensor in again.state_dict().items())
    assert Run.read(trainer.args.output_dir).recipe["shape"] == "native"


def test_a_rejected_stage_is_put_back(make_trainer):
    trainer = make_trainer(recipe=RECIPE | {"max_metric_drop": -1.0}, max_steps=6)
    whole = count_parameters(trainer.model)
    trainer.train()
    assert count_parameters(trainer.model) == whole and type(trainer.model) is BertForSequenceClassification
