"""Language models distilled with logits of a few positions at a time."""

from __future__ import annotations

import datasets
import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from optimum_rmtkd import RMTKDConfig, RMTKDLoop
from optimum_rmtkd.distillation import (
    CachedTeacher,
    DistillationObjective,
    KLDivergence,
    SnapshotTeacher,
    TaskLoss,
    WeightedTeachers,
    cache_answers,
)
from optimum_rmtkd.distillation.cached import AnswerCollator
from optimum_rmtkd.trainer import RMTKDTrainer, rehearsal

from .conftest import ragged, tiny_bert


NONE = {"schedule": "none", "target_reduction": None}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def tiny_llama(seed=0, **changes):
    torch.manual_seed(seed)
    given = {"vocab_size": 60, "max_position_embeddings": 64, "pad_token_id": 0, "attn_implementation": "eager"}
    return LlamaForCausalLM(LlamaConfig(**(SIZES | given | changes)))


def perturbed(model):
    torch.manual_seed(9)
    teacher = SnapshotTeacher(model).model
    for parameter in teacher.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter) * parameter.std())
    return teacher


def packed(rows=16, length=12):
    """Two documents in each row, told apart by their positions alone."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(5, 60, (rows, length), generator=generator)
    positions = torch.cat((torch.arange(5), torch.arange(length - 5))).repeat(rows, 1)
    labels = ids.masked_fill(positions == 0, -100)  # the first word of a document follows from nothing
    return [{"input_ids": i, "position_ids": p, "labels": y} for i, p, y in zip(ids, positions, labels, strict=True)]


def without_labels(rows):
    return [{name: value for name, value in row.items() if name != "labels"} for row in rows]


@pytest.fixture
def run(make_trainer, tmp_path):
    """(losses of three steps, weights after them, the trainer) of a distillation from a perturbed copy."""

    def go(chunk, data, model=None, teacher=None, out="out", **arguments):
        model = tiny_llama() if model is None else model
        given = {"train_dataset": data, "eval_dataset": None} | arguments.pop("trainer_kwargs", {})
        trainer = make_trainer(
            model=model,
            recipe=NONE | {"logits_chunk": chunk, "disable_dropout": True},
            teacher_model=perturbed(model) if teacher is None else teacher(model),
            trainer_kwargs=given,
            out=f"{out}{chunk}",
            **({"max_steps": 3, "per_device_train_batch_size": 4} | arguments),
        )
        trainer.train()
        logs = [line for line in trainer.state.log_history if "loss" in line]
        terms = [{k: v for k, v in line.items() if k.startswith("loss")} for line in logs]
        return terms, torch.cat([p.detach().flatten() for p in model.parameters()]), trainer

    return go


def same(one, other):
    for ours, theirs in zip(one[0], other[0], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)
    assert torch.allclose(one[1], other[1], atol=1e-4)


KINDS = {
    "padded": lambda: ragged(16, kind="causal"),
    "packed": packed,
    "unlabelled": lambda: without_labels(ragged(16, kind="causal")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_chunks_is_the_run_on_whole_logits(run, kind, caplog):
    whole, chunks = (run(chunk, KINDS[kind]()) for chunk in (None, 5))
    same(whole, chunks)
    terms = set(chunks[0][0])
    assert terms == ({"loss", "loss/kl"} if kind == "unlabelled" else {"loss", "loss/task", "loss/kl"})
    assert "kept in memory" not in caplog.text
    if kind == "unlabelled":
        assert "the teacher's answers weigh 1" in caplog.text
        assert chunks[0][0]["loss"] == pytest.approx(chunks[0][0]["loss/kl"], rel=1e-4)


def test_a_teacher_on_another_device_is_rehearsed_on_whole_logits(run, monkeypatch):
    """Its output layer cannot be tried on the student's batch."""
    asked, plan = [], rehearsal._plan
    monkeypatch.setattr(rehearsal, "_place", lambda teacher: torch.device("meta"))
    monkeypatch.setattr(rehearsal, "to_device", lambda batch, device: batch)
    monkeypatch.setattr(rehearsal, "_plan", lambda *args: asked.append(args[2]) or plan(*args))
    run(5, ragged(16, kind="causal"), max_steps=1)
    assert asked == [None]
    monkeypatch.undo()
    assert rehearsal._place(SnapshotTeacher(tiny_llama())) == torch.device("cpu")


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_accumulated_chunks_are_one_big_batch(run, kind):
    data = KINDS[kind]()
    big = run(5, data, out="big", per_device_train_batch_size=8, max_steps=1)
    small = run(5, data, out="small", per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1)
    assert small[0][0]["loss"] == pytest.approx(big[0][0]["loss"], rel=1e-4)
    assert torch.allclose(big[1], small[1], atol=1e-4)


def test_an_evaluation_makes_no_whole_logits(run):
    data = ragged(16, kind="causal")
    *_, trainer = run(5, data, trainer_kwargs={"eval_dataset": data}, max_steps=1)
    trainer.run.loss.tutor.config = trainer.rmtkd_config.replace(logits_chunk=None)
    whole = trainer.evaluate()["eval_loss"]
    trainer.run.loss.tutor.config = trainer.rmtkd_config
    with Largest(60) as largest:
        assert trainer.evaluate()["eval_loss"] == pytest.approx(whole, rel=1e-5)
    assert 0 < largest.positions <= 16 < 8 * 11  # the turned weight of the output layer, of 16 rows


def test_a_masked_model_in_chunks(run):
    data = [
        row | {"labels": row["labels"].masked_fill(torch.arange(12) % 3 > 0, -100)}
        for row in ragged(16, kind="causal")
    ]
    same(*(run(chunk, data, model=tiny_bert(cls=BertForMaskedLM)) for chunk in (None, 5)))


def test_several_teachers_in_chunks(run):
    def teachers(model):
        return WeightedTeachers([perturbed(model), tiny_llama(3)], [3, 1])

    same(*(run(chunk, ragged(16, kind="causal"), teacher=teachers) for chunk in (None, 5)))


def test_cached_answers_in_chunks_are_never_written_out(run, monkeypatch):
    from optimum_rmtkd.distillation.sparse import SparseLogits

    rows = [{k: v.tolist() for k, v in row.items()} for row in ragged(16, kind="causal")]

    def collate(samples):
        return {k: torch.tensor([sample[k] for sample in samples]) for k in samples[0]}

    data = cache_answers(perturbed(tiny_llama()), datasets.Dataset.from_list(rows), collate, k=7, progress=False)
    given = {"data_collator": AnswerCollator(collate)}
    whole = run(None, data, teacher=lambda model: CachedTeacher(), trainer_kwargs=given)
    monkeypatch.setattr(SparseLogits, "dense", lambda self: pytest.fail("written out over all words"))
    same(whole, run(5, data, teacher=lambda model: CachedTeacher(), trainer_kwargs=given))


def test_an_objective_that_reads_whole_logits_gets_them(run, caplog):
    class LogitsMSE(DistillationObjective):
        name = "logits_mse_of_a_test"

        def forward(self, step):
            ours, theirs = (outputs["logits"] for outputs in (step.student_outputs, step.teacher_outputs))
            assert ours.shape == theirs.shape == (4, 12, 60)
            return (ours - theirs).square().mean() * step.share("samples")

    run(5, ragged(16, kind="causal"), objectives=[TaskLoss(), LogitsMSE()])
    assert "LogitsMSE reads them" in caplog.text


def test_a_run_that_goes_on_knows_whether_the_loss_calls_the_head(run, make_trainer, tmp_path):
    class OfLogits(RMTKDTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            return (loss, outputs) if return_outputs else loss

    saving = {"trainer_class": OfLogits, "save_strategy": "steps", "save_steps": 2}
    whole = run(5, ragged(16, kind="causal"), **saving)[2]
    assert whole._calls_head is True
    resumed = make_trainer(
        model=tiny_llama(),
        recipe=NONE | {"logits_chunk": 5, "disable_dropout": True},
        teacher_model=perturbed(tiny_llama()),
        trainer_kwargs={"train_dataset": ragged(16, kind="causal"), "eval_dataset": None},
        out="resumed",
        max_steps=3,
        per_device_train_batch_size=4,
        **saving,
    )
    resumed._watched_head = lambda: pytest.fail("a pass of its own, to see what is known")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out5" / "checkpoint-2"))
    assert resumed.state.log_history[-2]["loss"] == whole.state.log_history[-2]["loss"]
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))


def test_label_smoothing_reads_the_outputs_from_the_first_step(run, caplog):
    *_, trainer = run(5, ragged(16, kind="causal"), label_smoothing_factor=0.1, max_steps=1)
    assert trainer._task_comes_about() == "outputs" and trainer._calls_head is None
    assert "the task's loss is computed from them by code of its own" in caplog.text


class DoubledLlama(LlamaForCausalLM):
    """A loss of its own beside the inherited one."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **rest):
        outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **rest)
        return outputs if outputs.loss is None else outputs | {"loss": 2 * outputs.loss}


def test_a_model_that_computes_a_loss_of_its_own_trains_on_it(run, caplog):
    def model():
        return DoubledLlama(tiny_llama().config)

    whole = run(None, ragged(16, kind="causal"), model=model(), max_steps=1)[0][0]
    chunks = run(5, ragged(16, kind="causal"), model=model(), max_steps=1)[0][0]
    assert chunks == pytest.approx(whole, rel=1e-5) and chunks["loss/task"] > 1.5 * torch.tensor(60.0).log()
    assert "the loss of DoubledLlama is not the mean cross-entropy over the labels" in caplog.text


def test_a_term_that_computes_otherwise_is_not_asked_by_position(run, caplog):
    class Doubled(KLDivergence):
        name = "doubled_of_a_test"

        def forward(self, step):
            assert step.stream is None
            return 2 * super().forward(step)

    run(5, ragged(16, kind="causal"), objectives=[Doubled()])
    assert "Doubled reads them" in caplog.text


WORDS = 128_256


class Largest(TorchDispatchMode):
    """Positions of the largest tensor over all words that an operation returns."""

    def __init__(self, words):
        super().__init__()
        self.words, self.positions = words, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for tensor in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            if torch.is_tensor(tensor) and tensor.dim() > 1 and tensor.shape[-1] == self.words:
                self.positions = max(self.positions, tensor.numel() // self.words)
        return outputs


def peak_of(trainer):
    """Bytes above those at its beginning that a training had allocated at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer.train()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.fixture
def many_words(make_trainer):
    def make(tokens, chunk=16):
        torch.manual_seed(0)
        model = tiny_llama(vocab_size=WORDS, hidden_size=4, intermediate_size=4, max_position_embeddings=tokens)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(5, WORDS, (2, tokens), generator=generator)
        return make_trainer(
            model=model,
            recipe=NONE | {"logits_chunk": chunk},
            teacher_model=perturbed(model),
            trainer_kwargs={"train_dataset": [{"input_ids": i, "labels": i} for i in ids], "eval_dataset": None},
            max_steps=1,
            per_device_train_batch_size=2,
            optim="sgd",
            out=f"words{tokens}",
        )

    return make


def test_no_tensor_of_all_positions_and_words_is_made(many_words):
    trainer = many_words(48)
    with Largest(WORDS) as largest:
        trainer.train()
    assert 0 < largest.positions <= 16


def test_memory_does_not_grow_with_positions_times_words(many_words):
    few, many = (peak_of(many_words(tokens)) for tokens in (24, 96))
    matrix = 2 * (96 - 24) * WORDS * 4  # bytes of one matrix of logits more
    assert many - few < 0.1 * matrix


def test_a_loop_of_ones_own_in_chunks():
    def losses(chunk):
        model = tiny_llama()
        teacher, accelerator = perturbed(model), Accelerator(cpu=True)
        loader = torch.utils.data.DataLoader(ragged(16, kind="causal"), batch_size=4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        recipe = RMTKDConfig(schedule="none", logits_chunk=chunk)
        loop = RMTKDLoop(
            accelerator, model, optimizer, loader, max_steps=4, rmtkd_config=recipe, teacher_model=teacher
        )
        found = []
        for batch in loader:
            loss = loop.loss(batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        loop.end()
        return found

    with Largest(60) as largest:
        chunks = losses(5)
    assert largest.positions <= 16 and chunks == pytest.approx(losses(None), rel=1e-4)
