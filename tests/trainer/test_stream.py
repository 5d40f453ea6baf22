"""Training data that is iterated: each row is read once, and none is lost to the look at it."""

from __future__ import annotations

import itertools

import datasets
import numpy as np
import pytest
import torch

from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.trainer.checks import check_first_batch
from optimum_rmtkd.trainer.stream import Stream, _same, is_stream

from ..tables import some_slow
from .conftest import toy_data


class Numbers(torch.utils.data.IterableDataset):
    """range(total), anew at every iteration or once; counts what is read."""

    def __init__(self, total, once):
        self.total, self.read, self.source = total, 0, iter(range(total)) if once else None

    def __iter__(self):
        for number in range(self.total) if self.source is None else self.source:
            self.read += 1
            yield number


class Rows(Numbers):
    """The same with rows of the toy task, over and over."""

    def __iter__(self):
        rows = toy_data()
        for number in super().__iter__():
            yield rows[number % len(rows)]


def settled(dataset, wanted=4):
    stream = Stream(dataset, seed=0)
    assert stream.samples(2) == [0, 1] and stream.samples(wanted) == list(range(wanted))
    stream.settle()
    return stream


def test_rows_are_read_once_and_kept():
    data = Numbers(100, once=True)
    stream = Stream(data, seed=0)
    assert stream.samples(3) == stream.samples(3) == [0, 1, 2] and data.read == 3
    assert stream.samples(7) == list(range(7)) and stream.samples(2) == [0, 1] and data.read == 7


def test_what_can_be_read_once_is_trained_on_from_its_first_row():
    stream = settled(Numbers(10, once=True))
    data = stream.data
    assert list(data) == list(range(10))
    with pytest.raises(RMTKDError, match="can be read once and ran dry"):
        list(data)
    assert stream.samples(4) == [0, 1, 2, 3]  # a later cut is calibrated on the same rows


def test_what_begins_anew_is_left_as_it_is():
    data = Numbers(10, once=False)
    stream = settled(data)
    assert stream.data is data and list(data) == list(data) == list(range(10))
    assert stream.samples(4) == [0, 1, 2, 3]


def test_an_iterator_that_is_no_dataset_is_one_for_the_loader():
    for rows in (iter(range(9)), (number for number in range(9))):
        data = settled(rows).data
        assert isinstance(data, torch.utils.data.IterableDataset)
        assert list(data) == list(range(9))


def test_a_stream_shorter_than_the_calibration():
    stream = Stream(Numbers(3, once=True), seed=0)
    assert stream.samples(64) == [0, 1, 2]
    stream.settle()
    assert list(stream.data) == [0, 1, 2]


def test_a_length_is_kept():
    class Sized(Numbers):
        def __len__(self):
            return self.total

    once, anew = settled(Sized(8, once=True)).data, settled(Numbers(8, once=True)).data
    assert len(once) == 8 and not hasattr(anew, "__len__")


def test_workers_share_out_what_was_read():
    data = settled(Numbers(6, once=True), wanted=5).data
    loaded = [int(x) for x in itertools.chain(*torch.utils.data.DataLoader(data, batch_size=1, num_workers=2))]
    assert sorted(loaded) == list(range(6))


def test_rows_that_are_there_several_times_are_not_taken_for_a_new_beginning():
    class Same(Numbers):
        def __iter__(self):
            for number in super().__iter__():
                yield 0 if number < 20 else number

    for total in (25, 60):
        stream = Stream(Same(total, once=True), seed=0)
        stream.samples(12)
        stream.settle()
        assert list(stream.data) == [0] * 20 + list(range(20, total))
    anew = Stream(Same(60, once=False), seed=0)
    anew.samples(12)
    anew.settle()
    assert anew.data is anew.dataset


def test_workers_share_out_the_rest_as_well():
    class Sharded(Numbers):
        """Knows of workers, but its iteration begins in the main process."""

        def __iter__(self):
            worker = torch.utils.data.get_worker_info()
            step = 1 if worker is None else worker.num_workers
            yield from itertools.islice(super().__iter__(), 0 if worker is None else worker.id, None, step)

    data = settled(Sharded(40, once=True)).data
    loaded = [int(x) for x in itertools.chain(*torch.utils.data.DataLoader(data, batch_size=1, num_workers=2))]
    assert sorted(loaded) == list(range(40))


def test_reading_leaves_the_random_numbers_alone():
    class Noise(torch.utils.data.IterableDataset):
        def __iter__(self):
            for _ in range(9):
                yield torch.rand(2)

    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    stream = Stream(Noise(), seed=0)
    stream.samples(5)
    stream.settle()
    assert torch.rand(()) == expected
    assert isinstance(stream.data, Noise)  # seeded alike, its first row came again


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"a": torch.ones(2)}, {"a": torch.ones(2)}, True),
        ({"a": torch.ones(2)}, {"a": torch.zeros(2)}, False),
        ({"a": [np.ones(2), "x"]}, {"a": [np.ones(2), "x"]}, True),
        ({"a": [np.ones(2)]}, {"a": [np.ones(3)]}, False),
        ({"a": 1}, {"b": 1}, False),
        ((1, 2), [1, 2], False),
        ({"a": np.nan}, {"a": float("nan")}, True),
        ({"a": torch.tensor([1.0, np.nan])}, {"a": torch.tensor([1.0, np.nan])}, True),
        ({"a": np.array([np.nan])}, {"a": np.array([np.nan])}, True),
    ],
)
def test_rows_are_compared_by_value(one, other, same):
    assert _same(one, other) is same


# -- in the trainer ---------------------------------------------------------------------------------------------------


def stream_trainer(make_trainer, data, out="out", **options):
    given = {"train_dataset": data, "eval_dataset": None}
    return make_trainer(out=out, trainer_kwargs=given, **{"max_steps": 4, "optim": "sgd"} | options)


def test_the_first_look_takes_one_batch(make_trainer):
    data = Rows(500, once=True)
    check_first_batch(stream_trainer(make_trainer, data))
    assert data.read == 8


def test_all_cuts_and_the_training_share_the_rows(make_trainer):
    data = Rows(1000, once=True)
    recipe = {"target_reduction": 0.5, "rounds": 2}
    trainer = stream_trainer(make_trainer, data, recipe=recipe)
    trainer.train()
    assert len(trainer.stages) == 2 and trainer.train_dataset is data
    # 32 rows for both cuts, which are the first 32 to train on; one to see that it does not begin anew; and what
    # the loader fetches ahead
    assert data.read <= 32 + 1 + 8


def test_once_or_anew_the_run_is_the_same(make_trainer, weights):
    states = []
    for name, once in (("once", True), ("anew", False)):
        trainer = stream_trainer(make_trainer, Rows(64, once), out=name)
        trainer.train()
        states.append(weights(trainer.model))
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_generator_trains_too(make_trainer):
    trainer = stream_trainer(make_trainer, (row for row in toy_data() * 2))
    assert is_stream(trainer.train_dataset)
    assert trainer.train().metrics["reduction"] > 0.3


def test_a_dry_stream_says_so(make_trainer):
    for data in (Rows(0, once=True), Rows(0, once=False), iter(())):
        with pytest.raises(RMTKDError, match=r"gave no row.*ran dry"):
            stream_trainer(make_trainer, data).train()
    spent = Rows(16, once=True)
    stream_trainer(make_trainer, spent, out="first", recipe={"calibration_samples": 16}, max_steps=2).train()
    with pytest.raises(RMTKDError, match="Make a new one"):
        stream_trainer(make_trainer, spent, out="second").train()


def test_a_stream_that_ends_before_the_training_says_so(make_trainer):
    data = Rows(40, once=True)
    trainer = stream_trainer(make_trainer, data, max_steps=30)
    with pytest.raises(RMTKDError, match="ran dry before the training steps were done"):
        trainer.train()
    assert trainer.state.global_step == 5 and trainer.train_dataset is data


def test_a_resumed_run_reads_a_new_stream_to_the_same_bits(make_trainer, weights):
    recipe = {"target_reduction": 0.5, "rounds": 2, "stage_share": 0.9}
    options = {"recipe": recipe, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = stream_trainer(make_trainer, Rows(200, once=True), out="whole", **options)
    whole.train()
    resumed = stream_trainer(make_trainer, Rows(200, once=True), out="resumed", **options)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")  # before the second cut
    assert [stage.step for stage in resumed.stages] == [0, 5]
    ours, theirs = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("once", [True, False])
def test_streams_of_datasets(make_trainer, once):
    rows = [{k: v if isinstance(v, int) else v.tolist() for k, v in row.items()} | {"note": "x"} for row in toy_data()]
    source = iter(rows)

    def generate():
        yield from source if once else rows

    stream = datasets.IterableDataset.from_generator(generate)
    trainer = stream_trainer(make_trainer, stream)
    assert trainer.train().metrics["reduction"] > 0.3


def test_steps_have_to_be_known(make_trainer):
    for data in (Rows(64, once=False), (row for row in toy_data())):
        with pytest.raises(RMTKDError, match=r"has no length and max_steps is -1.*Set max_steps"):
            stream_trainer(make_trainer, data, max_steps=-1)


@pytest.mark.parametrize("kind", some_slow(["once", "anew", "generator", "named"], ["once", "named"]))
def test_every_stage_is_evaluated_on_the_same_rows(make_trainer, kind):
    rows = toy_data(16, seed=2)
    data = {
        "once": lambda: Rows(16, once=True),
        "anew": lambda: Rows(16, once=False),
        "generator": lambda: iter(rows),
        "named": lambda: {"one": Rows(16, once=True), "two": rows},
    }[kind]()
    given = {"eval_dataset": data, "compute_metrics": lambda prediction: {"rows": float(len(prediction.predictions))}}
    judged = "one_rows" if kind == "named" else "rows"
    trainer = make_trainer(
        recipe={"target_reduction": 0.5, "rounds": 2}, trainer_kwargs=given, metric_for_best_model=judged,
        eval_strategy="steps", eval_steps=2, max_steps=4,
    )  # fmt: skip
    trainer.train()
    for stage in trainer.stages:
        assert stage.metric_before == stage.metric_cut == stage.metric_after == 16
    assert [e[f"eval_{judged}"] for e in trainer.state.log_history if f"eval_{judged}" in e] == [16, 16]
    assert trainer.evaluate()[f"eval_{judged}"] == 16


def test_an_evaluation_of_no_row_says_so(make_trainer):
    for data in (Rows(0, once=False), iter(())):
        with pytest.raises(RMTKDError, match=r"eval_dataset .* gave no row"):
            make_trainer(trainer_kwargs={"eval_dataset": data}).train()
