"""Labels whose shape or dtype the loss of the head cannot take are named before the training."""

from __future__ import annotations

import pytest
import torch

from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.trainer.labels import check_labels

from .conftest import tiny_bert


IDS = torch.ones(4, 6, dtype=torch.long)
HOT = torch.eye(4, 3)
SEVERAL = "multi_label_classification"
FITTING = [
    (3, None, torch.tensor([0, 1, 2, 0])),
    (3, None, HOT),
    (3, SEVERAL, HOT),
    (3, "single_label_classification", torch.tensor([[0], [1], [2], [0]])),
    (1, None, torch.rand(4)),
    (1, None, torch.rand(4, 1)),
    (3, "regression", torch.rand(4, 3)),
]


def loss_of(labels, classes, problem):
    model = tiny_bert(num_labels=classes, problem_type=problem)
    model(input_ids=IDS, labels=labels).loss.backward()


@pytest.mark.parametrize("classes, problem, labels", FITTING)
def test_labels_that_fit_pass_and_have_a_loss(classes, problem, labels):
    check_labels(tiny_bert(num_labels=classes, problem_type=problem), {"input_ids": IDS, "labels": labels})
    loss_of(labels, classes, problem)


@pytest.mark.parametrize(
    "classes, problem, labels, told",
    [
        (3, None, HOT.long(), r"\(4, 3\) and are whole numbers.*problem_type=\"multi_label.*make the labels floats"),
        (3, "single_label_classification", HOT, r"problem_type=\"multi_label.*one class alone"),
        (3, SEVERAL, HOT.long(), "several classes, make the labels floats"),
        (3, SEVERAL, torch.tensor([0, 1, 2, 0]), "single_label_classification"),
        (3, None, torch.rand(4), "whole .int64., or load the model with num_labels=1"),
        (3, None, torch.eye(4, 5), r"the shape \(4, 3\)"),
        (3, "regression", torch.rand(4), "expects 12 numbers"),
    ],
)
def test_labels_that_do_not_fit_are_named(classes, problem, labels, told):
    model = tiny_bert(num_labels=classes, problem_type=problem)
    with pytest.raises(RMTKDError, match=told):
        check_labels(model, {"input_ids": IDS, "labels": labels})
    if problem != "regression":  # which torch broadcasts, and warns
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            loss_of(labels, classes, problem)


def test_a_trainer_says_so_before_it_trains(make_trainer):
    rows = [{"input_ids": ids, "labels": [1, 0, 1]} for ids in IDS]
    trainer = make_trainer(tiny_bert(num_labels=3), trainer_kwargs={"train_dataset": rows, "eval_dataset": rows})
    with pytest.raises(RMTKDError, match=SEVERAL):
        trainer.check_first_batch()
