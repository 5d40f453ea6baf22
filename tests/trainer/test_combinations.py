"""Every objective with every kind of task: two steps, or a refusal that says why."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BloomConfig,
    BloomForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForAudioClassification,
)

from optimum_rmtkd.batches import padding_mask
from optimum_rmtkd.commands.language import kind_of
from optimum_rmtkd.distillation import DistillationObjective, DistillationStep, build_objectives, capture
from optimum_rmtkd.distillation.counts import total_units
from optimum_rmtkd.distillation.layers import in_decoder
from optimum_rmtkd.distillation.objectives import objective_names
from optimum_rmtkd.errors import RMTKDError

from ..tables import covering
from .conftest import ragged, tiny_bert
from .test_accumulation import tiny_gpt2


NONE = {"schedule": "none", "target_reduction": None}


def images(samples=16):
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": int(i % 3)} for i in range(samples)
    ]


def choices(samples=16):
    rows = ragged(samples)
    pick = {"input_ids": lambda r: torch.stack([r["input_ids"], r["input_ids"].flip(0)])}
    return [
        {
            "input_ids": pick["input_ids"](r),
            "attention_mask": torch.stack([r["attention_mask"], torch.ones(12, dtype=torch.long)]),
            "labels": r["labels"],
        }
        for r in rows
    ]


def spans(samples=16):
    rows = ragged(samples)
    keys = ("input_ids", "attention_mask")
    return [{k: r[k] for k in keys} | {"start_positions": 0, "end_positions": 1} for r in rows]


def vit(seed, width=32):
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16,
        patch_size=8, num_labels=3,
    )  # fmt: skip
    return ViTForImageClassification(config)


def resnet(seed):
    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )  # fmt: skip
    return ResNetForImageClassification(config)


KINDS = {
    "token classification": (
        lambda seed: tiny_bert(seed, BertForTokenClassification, num_labels=3), ragged(16, kind="token")
    ),
    "sequence classification": (lambda seed: tiny_bert(seed, num_labels=3), ragged(16, kind="three")),
    "regression": (
        lambda seed: tiny_bert(seed, num_labels=1, problem_type="regression"), ragged(16, kind="regression")
    ),
    "causal": (tiny_gpt2, ragged(16, kind="causal")),
    "images": (vit, images()),
    "feature maps": (resnet, images()),
    "multiple choice": (lambda seed: tiny_bert(seed, BertForMultipleChoice), choices()),
    "spans": (lambda seed: tiny_bert(seed, BertForQuestionAnswering), spans()),
}  # fmt: skip
REFUSED = {
    ("regression", "correlation"): r"dim='class'\) over 1 class",
    ("multiple choice", "correlation"): r"dim='class'\) over 2 class",
    ("spans", "correlation"): "does not know spans",
    ("causal", "attention_relation"): "or query.* in .transformer.h.1. of GPT2LMHeadModel",
    ("feature maps", "attention_relation"): "or query.* in .* of ResNet",
    ("feature maps", "tensor_alignment"): "target_modules=None matches nothing",
}
CASES = covering(list(KINDS), objective_names(), without=REFUSED, times=2) + list(REFUSED)


@pytest.mark.parametrize(("kind", "objective"), CASES)
def test_two_steps_or_a_named_reason(make_trainer, kind, objective):
    build, data = KINDS[kind]
    own = objective == "hidden"  # compares a model with what it was

    def trainer_of_both():
        return make_trainer(
            build(0),
            recipe=NONE,
            teacher_model=None if own else build(1),
            objectives=[{"name": objective, "weight": 1.0}],
            max_steps=2,
            per_device_train_batch_size=4,
            remove_unused_columns=False,
            trainer_kwargs={
                "train_dataset": data,
                "eval_dataset": None,
                "reparameterization": "mpo" if objective == "tensor_alignment" else None,
            },
        )

    reason = REFUSED.get((kind, objective))
    if reason is not None:
        with pytest.raises(RMTKDError, match=reason):
            trainer_of_both().train()
        return
    trainer = trainer_of_both()
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    terms = [e[f"loss/{objective}"] for e in trainer.state.log_history if "loss" in e]
    assert len(terms) == 2 and all(torch.isfinite(torch.tensor(terms)))
    if not own:
        assert terms[0] > 0
        assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("objective", ["kl", "skew_kl", "jensen_shannon", "correlation"])
def test_binary_and_regression_have_a_form(make_trainer, objective):
    """The vacuous correlation over two classes is refused, the one over the batch works, for one output too."""
    arguments = {"dim": "batch"} if objective == "correlation" else {}
    for labels, kind in ((2, "sequence"), (1, "regression")):
        problem = {"problem_type": "regression"} if labels == 1 else {}
        trainer = make_trainer(
            tiny_bert(num_labels=labels, **problem),
            recipe=NONE,
            out=f"{labels}",
            teacher_model=tiny_bert(seed=1, num_labels=labels, **problem),
            objectives=[{"name": objective, "weight": 1.0, **arguments}],
            max_steps=2,
            trainer_kwargs={"train_dataset": ragged(16, kind=kind), "eval_dataset": None},
        )
        trainer.train()
        assert [e["loss"] for e in trainer.state.log_history if "loss" in e][0] > 0


@pytest.mark.parametrize("kind", ["sequence classification", "images", "feature maps"])
@pytest.mark.parametrize("objective", ["projected_feature", "attention_relation"])
def test_students_of_another_width_and_depth(make_trainer, kind, objective):
    if kind == "feature maps" and objective == "attention_relation":
        pytest.skip("no attention")
    build, data = KINDS[kind]
    small = {
        "sequence classification": lambda: tiny_bert(num_labels=3, hidden_size=16, num_hidden_layers=1),
        "images": lambda: vit(0, width=16),
        "feature maps": lambda: ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3)
        ),
    }[kind]()
    trainer = make_trainer(
        small,
        recipe=NONE,
        teacher_model=build(1),
        objectives=["task", {"name": objective, "layers": "uniform"}],
        max_steps=4,
        per_device_train_batch_size=4,
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=4,
        trainer_kwargs={"train_dataset": data, "eval_dataset": None},
    )
    trainer.train()
    extra = trainer.run.tutor.companions.parameters
    assert bool(extra) == (objective == "projected_feature")
    names = set(trainer.model.state_dict())
    assert not [name for name in names if "adapter" in name]
    if extra:
        start = DistillationObjective.from_dict({"name": "projected_feature"})
        assert start.to_dict()["projection"]["name"] == "marchenko_pastur"
        assert all(p.grad is None or p.grad.abs().sum() == 0 for p in extra)  # cleared after every step
        assert all(trainer.run.tutor.companions.optimizer.state[p]["step"] == 4 for p in extra)


def test_unlabelled_rows_have_no_task_loss(make_trainer):
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in ragged(16)]
    trainer = make_trainer(
        recipe=NONE, objectives=["task"], trainer_kwargs={"train_dataset": rows, "eval_dataset": None}
    )
    with pytest.raises(RMTKDError, match="leave the task.s loss out .*objectives=.KLDivergence"):
        trainer.train()


def tiny_bart(seed, cls=BartForConditionalGeneration):
    torch.manual_seed(seed)
    kinds = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
    sizes = {f"{side}_{kind}": size for side in ("encoder", "decoder") for kind, size in kinds.items()}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = BartConfig(vocab_size=60, d_model=32, max_position_embeddings=32, **sizes, **ends)
    return cls(config)


def test_an_encoder_with_a_decoder_is_no_unlabelled_text(make_trainer):
    """transformers counts BART among the masked language models; its labels are texts of their own."""
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in ragged(16)]
    trainer = make_trainer(tiny_bart(0), recipe=NONE, trainer_kwargs={"train_dataset": rows, "eval_dataset": None})
    with pytest.raises(RMTKDError, match="leave the task.s loss out .*objectives=.KLDivergence"):
        trainer.train()
    assert kind_of(BartConfig(architectures=["BartForConditionalGeneration"])) is None


def test_features_of_encoder_decoders(make_trainer):
    data = [dict(row, labels=row["input_ids"][:7]) for row in ragged(16)]
    layers = {path: path for path in ("model.encoder.layers.1", "model.decoder.layers.1")}
    relations = {"name": "attention_relation", "layers": layers}
    trainer = make_trainer(
        tiny_bart(0),
        recipe=NONE,
        teacher_model=tiny_bart(1),
        objectives=["kl", {"name": "projected_feature", "layers": layers, "projection": "random"}, relations],
        max_steps=2,
        trainer_kwargs={"train_dataset": data, "eval_dataset": None, "reparameterization": "mpo"},
    )
    trainer.train()
    for name in ("projected_feature", "attention_relation"):
        terms = [e[f"loss/{name}"] for e in trainer.state.log_history if "loss" in e]
        assert len(terms) == 2 and all(v > 0 for v in terms)


@pytest.mark.parametrize("task", ["generation", "classification"])
@pytest.mark.parametrize("name", ["projected_feature", "attention_relation"])
def test_padding_of_a_decoder_does_not_count(name, task):
    """Encoder and decoder are of one length here, so that of generation the encoder's mask would fit, too."""
    kind = {"generation": BartForConditionalGeneration, "classification": BartForSequenceClassification}[task]
    student, teacher = (tiny_bart(seed, kind) for seed in (0, 1))
    layers = {path: path for path, _ in student.named_modules() if path.endswith("decoder.layers.1")}
    objective = build_objectives([{"name": name, "layers": layers}])[0]
    objective.setup(student, teacher, {})
    ids = torch.randint(3, 60, (4, 5), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 2  # the classifier reads the end token
    ignored = torch.tensor([[0, 0, 0, 1, 1]] * 2 + [[0] * 5] * 2).bool()

    def step_of(padding):
        mask = torch.ones_like(ids) if task == "generation" else (~ignored).long()
        labels = ids.flip(1).masked_fill(ignored, -100)
        inputs = {
            "input_ids": torch.nn.functional.pad(ids, (0, padding)),
            "attention_mask": torch.nn.functional.pad(mask, (0, padding)),
            "labels": torch.nn.functional.pad(labels, (0, padding), value=-100),
        }
        if task == "classification":
            inputs["labels"] = torch.arange(4) % 2
        features = []
        for model, paths in ((student, objective.features().student), (teacher, objective.features().teacher)):
            with capture(model.eval(), paths) as found, torch.no_grad():
                model(**inputs)
            features.append(found)
        mask, totals = padding_mask(inputs), total_units([inputs])
        return DistillationStep(
            inputs, student_features=features[0], teacher_features=features[1], mask=mask, totals=totals
        )

    plain, padded, broken = step_of(0), step_of(3), step_of(0)
    for features in (broken.student_features, broken.teacher_features):
        for path, feature in features.items():
            features[path] = feature.masked_fill(ignored[..., None], float("nan"))
    if objective.observes:
        objective.observe(plain)
        objective.finish()
    assert objective(plain) > 0
    torch.testing.assert_close(objective(padded), objective(plain))
    torch.testing.assert_close(objective(broken), objective(plain))


def test_what_belongs_to_a_decoder():
    assert in_decoder(tiny_bart(0), "model.decoder.layers.1") and not in_decoder(
        tiny_bart(0), "model.encoder.layers.1"
    )
    sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    alone = WhisperForAudioClassification(WhisperConfig(vocab_size=9, pad_token_id=0, **sizes, num_mel_bins=4))
    assert not in_decoder(alone, "encoder.layers.0")  # is_encoder_decoder, without a decoder


def tiny_bloom():
    """A causal model whose residual blocks no family declares."""
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=64, n_layer=2, n_head=4, pad_token_id=0))


def test_hidden_states_drop_out_where_no_blocks_are_declared(make_trainer, caplog):
    data = {"train_dataset": ragged(16, kind="causal"), "eval_dataset": None}
    trainer = make_trainer(
        tiny_bloom(), recipe={"form": "factored"}, max_steps=2, objectives=None, trainer_kwargs=data
    )
    trainer.train()
    assert "HiddenStateLoss drops out" in caplog.text
    assert [o.label for o in trainer.run.loss.objectives] == ["task", "kl"]
    trainer = make_trainer(tiny_bloom(), recipe=NONE, max_steps=2, objectives=["hidden"], trainer_kwargs=data)
    with pytest.raises(RMTKDError, match="No objective has anything to compare"):
        trainer.train()


def test_factored_form_on_an_architecture_without_a_family(make_trainer, caplog):
    trainer = make_trainer(
        tiny_bloom(),
        recipe={"form": "factored", "target_reduction": 0.1},
        max_steps=2,
        trainer_kwargs={"train_dataset": ragged(32, kind="causal"), "eval_dataset": None},
    )
    output = trainer.train()
    assert "HiddenStateLoss drops out" in caplog.text and output.metrics["reduction"] > 0.05


def test_a_mapping_of_layers_is_refused_where_blocks_may_go(make_trainer):
    recipe = {"sites": ("block", "intermediate"), "target_reduction": 0.2}
    objectives = [{"name": "projected_feature", "layers": {0: 0}}]
    with pytest.raises(RMTKDError, match="mapping of layers beside the site 'block'"):
        make_trainer(recipe=recipe, objectives=objectives).train()
