"""The mixin in front of the trainer of sentence-transformers: what is narrowed lies inside its model."""

from __future__ import annotations

import datasets
import pytest
import torch
import transformers
from transformers import BertModel, PreTrainedTokenizerFast

from optimum_rmtkd import RMTKDConfig, RMTKDError, RMTKDMixin
from optimum_rmtkd.distillation import HiddenStateLoss, TaskLoss

from .conftest import tiny_bert
from .test_own_loss import terms


st = pytest.importorskip("sentence_transformers", reason="needs the extra embeddings")
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
evaluation = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")

WORDS = [f"w{n}" for n in range(55)]
KEPT = ("intermediate", "attention_qk", "attention_vo")
NONE = {"schedule": "none", "target_reduction": None}
SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<m>"}


class Sentences(RMTKDMixin, st.SentenceTransformerTrainer):
    pass


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Folder of a tiny BERT and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("encoder")
    inner = Tokenizer(models.WordLevel({w: n for n, w in enumerate([*SPECIAL.values(), *WORDS])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=32, **SPECIAL).save_pretrained(folder)
    tiny_bert(cls=BertModel).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def sentence_model(encoder):
    def make(*behind, pooling="mean"):
        first = modules.Transformer(encoder)
        behind = behind or (modules.Normalize(),)
        return st.SentenceTransformer(modules=[first, modules.Pooling(32, pooling), *behind], device="cpu")

    return make


def pairs(samples=48, seed=0):
    """Two texts of different lengths, and how many words they share."""
    generator = torch.Generator().manual_seed(seed)
    rows = {"first": [], "second": [], "score": []}
    for _ in range(samples):
        one = torch.randint(0, 55, (int(torch.randint(3, 12, (), generator=generator)),), generator=generator).tolist()
        kept = int(torch.randint(0, 3, (), generator=generator))
        other = one[:kept] + torch.randint(0, 55, (3,), generator=generator).tolist()
        rows["first"].append(" ".join(WORDS[w] for w in one))
        rows["second"].append(" ".join(WORDS[w] for w in other))
        rows["score"].append(kept / 2)
    return datasets.Dataset.from_dict(rows)


def classes():
    rows = pairs()
    labels = [int(2 * score) for score in rows["score"]]
    return rows.remove_columns("score").add_column("label", labels)


def judge(name="dev"):
    rows = pairs(24, 1)
    return evaluation.EmbeddingSimilarityEvaluator(
        rows["first"][:], rows["second"][:], rows["score"][:], name=name, write_csv=False
    )


@pytest.fixture
def make_sentences(tmp_path, sentence_model):
    def make(model=None, recipe=None, out="out", loss=losses.CoSENTLoss, given=None, cls=Sentences, **arguments):
        arguments = {
            "max_steps": 6,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
        } | arguments
        usual = {"target_reduction": 0.3, "calibration_samples": 32, "round_to": 4, "min_width": 4}
        usual["sites"] = ("hidden",)
        model = sentence_model() if model is None else model
        rest = {"train_dataset": pairs(), "eval_dataset": pairs(16, 1)} | (given or {})
        trainer = cls(
            model=model,
            args=st.SentenceTransformerTrainingArguments(str(tmp_path / out), **arguments),
            loss=loss(model),
            rmtkd_config=RMTKDConfig(**(usual | (recipe or {}))),
            **rest,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    return make


def test_the_transformer_inside_is_narrowed(make_sentences, tmp_path):
    trainer = make_sentences(max_steps=8, bf16=True, gradient_checkpointing=True, gradient_accumulation_steps=2)
    whole, inner = trainer.model, trainer.model[0].auto_model
    metrics = trainer.train().metrics
    assert trainer.model is whole and whole[0].auto_model is inner and type(inner).__name__ == "RMTKDBertModel"
    width = inner.config.hidden_size
    assert width < 32 and metrics["reduction"] > 0.25 and trainer.stages[-1].status == "accepted"
    for line in terms(trainer):
        assert {"loss/task", "loss/hidden"} <= set(line) and "loss/kl" not in line
    texts = pairs(4, 2)["first"][:]
    trainer.accelerator.unwrap_model(whole, keep_fp32_wrapper=False)  # no autocast from here on
    expected = whole.encode(texts)
    assert expected.shape == (4, width)
    for save, folder in ((trainer.save_model, "saved"), (whole.save_pretrained, "pretrained")):
        save(str(tmp_path / folder))
        again = st.SentenceTransformer(str(tmp_path / folder), device="cpu")
        assert again[1].get_config_dict()["embedding_dimension"] == width
        torch.testing.assert_close(torch.tensor(again.encode(texts)), torch.tensor(expected))


def test_columns_are_read_as_one_batch_of_texts(make_sentences):
    trainer = make_sentences(recipe=NONE)
    rows = [trainer.train_dataset[i] for i in range(8)]
    batch = trainer.data_collator(rows)
    read = trainer._host.inside.read(batch)
    assert set(read) == {"input_ids", "attention_mask"} and len(read["input_ids"]) == 16
    inner = trainer.model[0].auto_model.eval()
    columns, labels = trainer.collect_features(dict(batch))
    with torch.no_grad():
        together = inner(**read).last_hidden_state
        for number, column in enumerate(columns):
            alone = inner(**{name: column[name] for name in read}).last_hidden_state
            kept = column["attention_mask"].bool()
            ours = together[8 * number : 8 * number + 8, : kept.shape[1]]
            torch.testing.assert_close(ours[kept], alone[kept])
    assert torch.equal(batch["label"], labels)


def test_the_task_term_is_its_own_loss(make_sentences, tmp_path, sentence_model):
    trainer = make_sentences(recipe=NONE, max_steps=1, learning_rate=0.0)
    trainer.train()
    (line,) = terms(trainer)
    model = sentence_model()
    plain = st.SentenceTransformerTrainer(
        model=model,
        args=st.SentenceTransformerTrainingArguments(
            str(tmp_path / "plain"),
            max_steps=1,
            per_device_train_batch_size=8,
            learning_rate=0.0,
            use_cpu=True,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
        ),
        loss=losses.CoSENTLoss(model),
        train_dataset=pairs(),
    )
    plain.train()
    # dropout draws the same numbers: the task's pass is the first one of a step
    assert line["loss/task"] == pytest.approx(plain.state.log_history[0]["loss"], rel=1e-5)


def test_the_hidden_states_of_all_columns_are_distilled(make_sentences):
    rows = pairs(8)
    trainer = make_sentences(
        given={"objectives": [HiddenStateLoss(1.0)], "train_dataset": rows, "eval_dataset": None},
        max_steps=1,
        learning_rate=0.0,
    )
    trainer.train()
    (line,), (objective,) = terms(trainer), trainer.objectives
    student, teacher = trainer.model[0].auto_model.eval(), trainer.run.initial
    columns, _ = trainer.collect_features(trainer.data_collator([rows[i] for i in range(8)]))
    squares, values = torch.zeros(2), 0
    for column in columns:  # each by itself, as its texts are padded
        kept = column["attention_mask"].bool()
        inputs = {name: column[name] for name in ("input_ids", "attention_mask")} | {"output_hidden_states": True}
        with torch.no_grad():
            ours, theirs = student(**inputs).hidden_states[1:], teacher(**inputs).hidden_states[1:]
        for block in range(2):
            target = theirs[block][kept] @ objective._projections[f"encoder.layer.{block}"]
            squares[block] += (ours[block][kept] - target).square().sum()
        values += target.numel()
    assert line["loss/hidden"] == pytest.approx(float((squares / values / objective.variance).mean()), rel=1e-4)
    assert line["loss"] == pytest.approx(line["loss/hidden"]) and line["grad_norm"] > 0


def test_terms_do_not_depend_on_accumulation(make_sentences):
    lines = []
    for size, steps in ((8, 1), (2, 4)):
        trainer = make_sentences(
            given={"objectives": [HiddenStateLoss(1.0)]},
            max_steps=1,
            learning_rate=0.0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        trainer.train()
        lines += terms(trainer)
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    "loss",
    [
        losses.MultipleNegativesRankingLoss,
        lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4),
        losses.CosineSimilarityLoss,
        lambda model: losses.MatryoshkaLoss(model, losses.CoSENTLoss(model), [8, 4]),
    ],
    ids=["in-batch negatives", "gradient cache", "cosine", "prefixes"],
)
def test_losses(make_sentences, loss):
    rows = pairs()
    if "MultipleNegatives" in repr(loss(make_sentences().model)):
        rows = rows.remove_columns("score")
    trainer = make_sentences(loss=loss, given={"train_dataset": rows, "eval_dataset": None}, max_steps=3)
    trainer.train()
    assert trainer.stages[-1].status == "accepted" and trainer.model[0].auto_model.config.hidden_size < 32


@pytest.mark.parametrize("what", ["layer", "loss"])
def test_what_needs_the_width_keeps_the_stream(make_sentences, sentence_model, what):
    layers = (modules.Dense(32, 16), modules.Normalize()) if what == "layer" else ()
    model = sentence_model(*layers)
    width = model.get_embedding_dimension()
    softmax = lambda model: losses.SoftmaxLoss(model, width, num_labels=3)  # noqa: E731
    options = {"loss": softmax if what == "loss" else losses.CoSENTLoss}
    options["given"] = {"train_dataset": classes(), "eval_dataset": None}
    with pytest.raises(RMTKDError, match="sites="):
        make_sentences(model, **options).train()
    model = sentence_model(*layers)
    trainer = make_sentences(model, recipe={"sites": KEPT, "target_reduction": 0.2}, **options)
    trainer.train()
    assert trainer.stages[-1].status == "accepted" and model.get_embedding_dimension() == width


def test_layers_of_a_loss_keep_their_moments_over_a_cut(make_sentences, sentence_model):
    softmax = lambda model: losses.SoftmaxLoss(model, 32, num_labels=3)  # noqa: E731
    trainer = make_sentences(
        loss=softmax,
        recipe={"sites": KEPT, "target_reduction": 0.2, "rounds": 2},
        given={"train_dataset": classes(), "eval_dataset": None},
        max_steps=8,
    )
    trainer.train()
    state = trainer.optimizer.state[trainer.loss.classifier.weight]
    assert len(trainer.stages) == 2 and int(state["step"]) == 8


def test_an_evaluator_judges_the_stages(make_sentences):
    trainer = make_sentences(
        given={"eval_dataset": None, "evaluator": judge()},
        metric_for_best_model="dev_spearman_cosine",
    )
    trainer.train()
    stage = trainer.stages[-1]
    assert stage.metric_name == "eval_dev_spearman_cosine"
    assert stage.metric_after == pytest.approx(trainer.evaluate()["eval_dev_spearman_cosine"])


def test_several_sets_and_losses(make_sentences):
    ranked = pairs(seed=3).remove_columns("score").rename_columns({"first": "anchor", "second": "positive"})
    several = datasets.DatasetDict(scored=pairs(), ranked=ranked)
    both = lambda model: {  # noqa: E731
        "scored": losses.CoSENTLoss(model),
        "ranked": losses.MultipleNegativesRankingLoss(model),
    }
    trainer = make_sentences(loss=both, given={"train_dataset": several, "eval_dataset": None})
    trainer.train()
    assert trainer.stages[-1].status == "accepted"


def test_a_run_is_resumed(make_sentences, sentence_model, tmp_path, weights):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make_sentences(out="whole", **options)
    whole.train()
    again = make_sentences(out="again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, tensor in weights(again.model).items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name


def test_the_best_model_is_one_after_the_cut(make_sentences):
    trainer = make_sentences(
        given={"evaluator": judge()},
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_dev_spearman_cosine",
    )
    trainer.train()
    name = "eval_dev_spearman_cosine"
    evaluated = [line[name] for line in trainer.state.log_history if "eval_loss" in line]
    assert trainer.evaluate()[name] == pytest.approx(max(evaluated))


def test_a_teacher_of_another_shape(make_sentences, sentence_model):
    from optimum_rmtkd.distillation import ProjectedFeatureLoss

    teacher = sentence_model()
    objectives = [TaskLoss(0.5), ProjectedFeatureLoss("pca", layers="last")]
    trainer = make_sentences(recipe=NONE, given={"teacher_model": teacher, "objectives": objectives}, max_steps=2)
    trainer.train()
    assert all("loss/projected_feature" in line for line in terms(trainer))


def test_transforms_are_refused(make_sentences):
    with pytest.raises(RMTKDError, match="EmbeddingMixup works on the batches"):
        make_sentences(given={"transforms": "embedding_mixup"})


def test_models_without_one_transformer_are_refused(make_sentences, sentence_model, encoder):
    router = modules.Router.for_query_document(
        [modules.Transformer(encoder), modules.Pooling(32)], [modules.Transformer(encoder), modules.Pooling(32)]
    )
    routed = {"router_mapping": {"first": "query", "second": "document"}}
    with pytest.raises(RMTKDError, match="holds 2 models"):
        make_sentences(st.SentenceTransformer(modules=[router], device="cpu"), **routed)


def test_a_loss_that_tokenizes_by_itself_is_refused(tmp_path, encoder):
    class Pairs(RMTKDMixin, st.CrossEncoderTrainer):
        pass

    model = st.CrossEncoder(encoder, num_labels=1, device="cpu")
    args = st.CrossEncoderTrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[])
    trainer = Pairs(model=model, args=args, train_dataset=pairs(), rmtkd_config=RMTKDConfig(target_reduction=0.3))
    with pytest.raises(RMTKDError, match="tokenizes by itself"):
        trainer.train()
