"""A new model for each training: `model_init`, and a search over hyperparameters."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import transformers
from transformers import trainer as transformers_trainer
from transformers.trainer_utils import BestRun, HPSearchBackend

from optimum_rmtkd import RMTKDConfig
from optimum_rmtkd.distillation import KLDivergence, ProjectedFeatureLoss, TaskLoss
from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.trainer import RMTKDTrainer, RMTKDTrainingArguments

from .conftest import RECIPE, tiny_bert, toy_data


@pytest.fixture
def trainer(tmp_path):
    arguments = RMTKDTrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=8, learning_rate=1e-3, save_strategy="steps",
        save_steps=3, logging_steps=1, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    made = RMTKDTrainer(
        model_init=lambda: tiny_bert(),
        args=arguments,
        rmtkd_config=RMTKDConfig(**RECIPE),
        objectives=[TaskLoss(0.5), KLDivergence(0.5), ProjectedFeatureLoss("random", layers="uniform")],
        train_dataset=toy_data(),
        eval_dataset=toy_data(16, seed=2),
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


class Backend:
    """A search without a library: the given rates, one after the other."""

    rates = (1e-3, 1e-4)

    def ensure_available(self):
        pass

    def run(self, trainer, n_trials, direction, **kwargs):
        found = {}
        for number in range(n_trials):
            trainer.train(trial=SimpleNamespace(number=number, params={"learning_rate": self.rates[number]}))
            found[number] = trainer.evaluate()["eval_loss"]
            run = trainer.run
            assert run.loss.accelerator is trainer.accelerator is run.tutor.companions.accelerator
        best = min(found, key=found.get)
        return BestRun(str(best), found[best], {"learning_rate": self.rates[best]})


def test_each_trial_of_a_search_leaves_its_record_in_its_own_folder(trainer, tmp_path, monkeypatch):
    backends = {HPSearchBackend.OPTUNA: Backend}
    monkeypatch.setattr(transformers_trainer, "ALL_HYPERPARAMETER_SEARCH_BACKENDS", backends)
    monkeypatch.setattr(transformers.integrations, "hp_params", lambda trial: trial.params)
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: trial.params, n_trials=2, backend="optuna", direction="minimize"
    )
    assert best.run_id in "01"
    assert not (tmp_path / "rmtkd_stages.json").exists()
    for number, rate in enumerate(Backend.rates):
        folder = tmp_path / f"run-{number}"
        told = json.loads((folder / "rmtkd_stages.json").read_text())
        assert told["reduction"] == pytest.approx(0.3, abs=0.05) and told["stages"][0]["metric_after"] > 0
        results = json.loads((folder / "rmtkd_results.json").read_text())
        assert results["training"]["learning_rate"] == rate
        assert (folder / "rmtkd_spectra.json").is_file() and (folder / "checkpoint-3").is_dir()


def test_a_training_from_a_new_model_repeats_the_first_one(trainer, weights):
    trainer.train()
    first, stages = weights(trainer.model), [stage.to_dict() for stage in trainer.stages]
    trainer.train()
    second = weights(trainer.model)
    assert first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)
    assert [stage.to_dict() for stage in trainer.stages] == stages


def test_what_is_wrong_with_the_model_of_a_later_trial_is_said_before_its_training(trainer):
    trainer.train()
    trainer.model_init, steps = lambda: tiny_bert().requires_grad_(False), []
    trainer.add_callback(Beginning(steps))
    with pytest.raises(RMTKDError, match="Every parameter of BertForSequenceClassification is frozen"):
        trainer.train()
    assert not steps


class Beginning(transformers.TrainerCallback):
    def __init__(self, seen):
        self.seen = seen

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen.append(state.global_step)
