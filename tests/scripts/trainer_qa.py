"""A Trainer for questions about a text: what the model says of tokens becomes an answer in words, and only then is
measured. Nothing here knows of a reduction."""

from __future__ import annotations

from transformers import Trainer
from transformers.trainer_utils import PredictionOutput


class QuestionAnsweringTrainer(Trainer):
    """`evaluate` and `predict` go from the logits of features, which have no labels, to the answers of examples."""

    def __init__(self, *args, eval_examples=None, post_process_function=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_examples = eval_examples
        self.post_process_function = post_process_function

    def evaluate(self, eval_dataset=None, eval_examples=None, ignore_keys=None, metric_key_prefix: str = "eval"):
        features = self.eval_dataset if eval_dataset is None else eval_dataset
        examples = self.eval_examples if eval_examples is None else eval_examples
        output = self._logits(self.get_eval_dataloader(features), "Evaluation", ignore_keys)
        metrics = {}
        if self.post_process_function is not None and self.compute_metrics is not None:
            answers = self.post_process_function(examples, features, output.predictions)
            metrics = self._named(self.compute_metrics(answers), metric_key_prefix)
            self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, predict_dataset, predict_examples, ignore_keys=None, metric_key_prefix: str = "test"):
        output = self._logits(self.get_test_dataloader(predict_dataset), "Prediction", ignore_keys)
        if self.post_process_function is None or self.compute_metrics is None:
            return output
        answers = self.post_process_function(predict_examples, predict_dataset, output.predictions)
        metrics = self._named(self.compute_metrics(answers), metric_key_prefix)
        return PredictionOutput(predictions=answers.predictions, label_ids=answers.label_ids, metrics=metrics)

    def _logits(self, dataloader, description: str, ignore_keys):
        compute_metrics, self.compute_metrics = self.compute_metrics, None  # not of features
        try:
            return self.evaluation_loop(
                dataloader,
                description=description,
                prediction_loss_only=True if compute_metrics is None else None,
                ignore_keys=ignore_keys,
            )
        finally:
            self.compute_metrics = compute_metrics

    @staticmethod
    def _named(metrics: dict[str, float], prefix: str) -> dict[str, float]:
        return {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": v for name, v in metrics.items()}
