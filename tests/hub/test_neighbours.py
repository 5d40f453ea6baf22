"""Reduced models beside the libraries that people already use."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertTokenizerFast, Trainer, TrainingArguments

from optimum_rmtkd import RMTKDConfig, RMTKDError, RMTKDTrainer, RMTKDTrainingArguments, lora_targets, narrow
from optimum_rmtkd.modeling_rmtkd import LowRankEmbedding, LowRankLinear
from optimum_rmtkd.surgery import narrow_to

from ..surgery import zoo
from ..trainer.conftest import tiny_bert, toy_data


RECIPE = RMTKDConfig(
    round_to=4, min_width=4, calibration_samples=16, importance="variance", target_reduction=0.4, fit_share=0
)
PLAIN = RECIPE.replace(refit=False)  # 16 samples determine no least squares: its weights would not bear any rounding
WIDTHS = {"hidden": 20, "layer.0.heads": 6, "layer.0.intermediate": 24, "layer.1.intermediate": 40, "embedding": 8}
QUIET = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "seed": 0}


@pytest.fixture
def small():
    """Narrow and with a factorised table."""
    return narrow_to(
        zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert", 2), WIDTHS, PLAIN, progress=False
    )


@pytest.fixture
def factored():
    """Two thin layers in place of each."""
    recipe = RECIPE.replace(form="factored")
    return narrow(zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert", 2), recipe, progress=False)


def outputs(model, batch=None):
    return zoo.outputs(copy.deepcopy(model).eval(), batch or zoo.batches("bert", 1)[0])


# PEFT


def lora(model, targets, seed=0):
    """An adapter that changes something: PEFT starts with a product of zero."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="SEQ_CLS"))


@pytest.mark.parametrize("targets", ["all-linear", "lora_targets"])
def test_lora_trains_saves_reloads_and_merges(small, targets, tmp_path):
    peft = pytest.importorskip("peft")
    small.save_pretrained(tmp_path / "small")
    adapted = lora(small, lora_targets(small) if targets == "lora_targets" else targets)
    before = outputs(adapted)
    rows = [{key: value[i] for key, value in zoo.batches("bert", 1)[0].items()} | {"labels": i % 3} for i in range(8)]
    args = TrainingArguments(str(tmp_path / "run"), max_steps=3, learning_rate=0.05, report_to="none", **QUIET)
    Trainer(adapted, args, train_dataset=rows).train()
    after = outputs(adapted)
    assert (after - before).abs().max() > 0.1

    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.allclose(outputs(again), after, atol=1e-5)
    merged = again.merge_and_unload()
    assert type(merged) is type(base)
    assert torch.allclose(outputs(merged), after, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.allclose(
        outputs(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")), after, atol=1e-4
    )


def test_lora_on_named_layers_that_are_factored(factored):
    assert isinstance(factored.bert.encoder.layer[0].attention.self.query, LowRankLinear)
    with pytest.raises(ValueError, match="not supported"):
        lora(copy.deepcopy(factored), ["query"])
    targets = lora_targets(factored, ["query", "value"])
    assert len(targets) == 8 and targets[0] == "bert.encoder.layer.0.attention.self.query.down"
    before = outputs(factored)
    adapted = lora(factored, targets)
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 8
    assert torch.equal(outputs(adapted), before)


def test_lora_targets_of_any_model(small):
    dense = zoo.make("bert", "ForSequenceClassification")
    assert lora_targets(dense, ["key"]) == [f"bert.encoder.layer.{i}.attention.self.key" for i in (0, 1)]
    assert "classifier" not in lora_targets(dense)
    assert "bert.embeddings.word_embeddings.up" in lora_targets(small)
    assert lora_targets(small.bert, ["key"])[0] == "encoder.layer.0.attention.self.key"
    with pytest.raises(RMTKDError, match="called q_proj; there are .*query"):
        lora_targets(dense, ["q_proj"])


TABLE = {
    "lora": {"target_modules": ["word_embeddings"]},
    "lora beside other layers": {"target_modules": ["word_embeddings", "query", "value"]},
    "tokens": {"target_modules": ["query"], "trainable_token_indices": {"word_embeddings": [5, 6]}},
    "tokens beside all layers": {
        "target_modules": "all-linear",
        "trainable_token_indices": {"word_embeddings": [5, 6]},
    },
    "the whole table": {"target_modules": ["query"], "modules_to_save": ["word_embeddings"]},
    "its projection": {"target_modules": r".*word_embeddings\.up"},
}


def trained(model, steps=3):
    """A few steps of all that PEFT lets learn."""
    batch = zoo.batches("bert", 1)[0]
    labels = torch.arange(len(batch["input_ids"])) % 3
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(steps):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.filterwarnings("ignore:.*its projection is left as it is")
@pytest.mark.parametrize("name", sorted(TABLE))
def test_adapters_of_a_factored_table_train_reload_and_merge(small, name, tmp_path):
    peft = pytest.importorskip("peft")
    small.save_pretrained(tmp_path / "small")
    before = outputs(small)
    adapted = peft.get_peft_model(small, peft.LoraConfig(r=4, task_type="SEQ_CLS", **TABLE[name]))
    assert torch.equal(outputs(adapted), before)
    after = outputs(trained(adapted))
    assert (after - before).abs().max() > 0.05
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.allclose(outputs(again), after, atol=1e-5)
    merged = again.merge_and_unload()
    table = merged.get_input_embeddings()
    assert type(table) is LowRankEmbedding and type(table.up) is torch.nn.Linear and table.weight.shape == (61, 8)
    assert torch.allclose(outputs(merged), after, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    final = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.allclose(outputs(final), after, atol=1e-4)


def test_only_the_tokens_that_are_trained_change(small):
    peft = pytest.importorskip("peft")
    chosen = sorted({int(i) for i in zoo.batches("bert", 1)[0]["input_ids"].flatten()} - {0})[:2]
    config = peft.LoraConfig(
        target_modules=["query"], task_type="SEQ_CLS", trainable_token_indices={"word_embeddings": chosen}
    )
    before = small.get_input_embeddings().weight.detach().clone()
    merged = trained(peft.get_peft_model(small, config)).merge_and_unload()
    moved = (merged.get_input_embeddings().weight - before).abs().amax(1) > 0
    assert moved.nonzero().flatten().tolist() == chosen


def test_new_tokens_are_added_and_trained(small, tmp_path):
    peft = pytest.importorskip("peft")
    small.resize_token_embeddings(64, mean_resizing=False)
    config = peft.LoraConfig(
        target_modules=["query"], task_type="SEQ_CLS", trainable_token_indices={"word_embeddings": [61, 62, 63]}
    )
    merged = trained(peft.get_peft_model(small, config)).merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids = {"input_ids": torch.tensor([[2, 61, 62, 63]])}
    assert zoo.close(outputs(again, ids), outputs(merged, ids))


def test_adapters_of_a_bf16_table(small):
    """PEFT keeps its own tensors in fp32."""
    peft = pytest.importorskip("peft")
    for options in (TABLE["lora"], TABLE["tokens"]):
        model = peft.get_peft_model(copy.deepcopy(small).bfloat16(), peft.LoraConfig(r=4, **options))
        assert model(**zoo.batches("bert", 1)[0]).logits.dtype == torch.bfloat16


def test_a_tied_decoder_keeps_the_trained_rows():
    peft = pytest.importorskip("peft")
    model = narrow_to(zoo.make("bert", "ForMaskedLM"), zoo.batches("bert", 2), {"hidden": 20}, PLAIN, progress=False)
    config = peft.LoraConfig(target_modules=["query"], trainable_token_indices={"word_embeddings": [5, 6]})
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.fill_(0.5)
    merged = adapted.merge_and_unload()
    assert merged.get_output_embeddings().up.weight is merged.get_input_embeddings().weight
    assert (merged.get_input_embeddings().weight[5:7] == 0.5).all()


@pytest.mark.parametrize(
    "config",
    [
        ("LoraConfig", {"target_modules": ["word_embeddings"], "use_dora": True}),
        ("HiraConfig", {"target_modules": ["word_embeddings"], "r": 2}),
        ("TinyLoraConfig", {"target_modules": ["word_embeddings"]}),
        ("OFTConfig", {"target_modules": ["word_embeddings"]}),
    ],
    ids=lambda given: given[0],
)
def test_adapters_that_need_a_table_of_full_width_are_refused_by_name(small, config):
    peft = pytest.importorskip("peft")
    kind, options = config
    if not hasattr(peft, kind):
        pytest.skip(f"this PEFT has no {kind}")
    with pytest.raises(ValueError, match=r"word_embeddings' is a table of short rows.*lora_targets\(model"):
        peft.get_peft_model(small, getattr(peft, kind)(**options))


def test_prompts_are_as_wide_as_the_output_of_the_table(small):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(small, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    assert model.prompt_encoder["default"].embedding.weight.shape == (3, 20)
    assert torch.isfinite(model(**zoo.batches("bert", 1)[0]).logits).all()


def test_a_model_with_a_merged_adapter_is_reduced_like_any_other(tmp_path):
    adapted = lora(zoo.make("bert", "ForSequenceClassification"), "all-linear")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    merged = adapted.merge_and_unload()
    assert not torch.allclose(outputs(merged), outputs(zoo.make("bert", "ForSequenceClassification")), atol=0.1)
    reduced = narrow(merged, zoo.batches("bert", 2), RECIPE, progress=False)
    reduced.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again).__name__ == "RMTKDBertForSequenceClassification"
    assert zoo.close(outputs(again), outputs(reduced))


# torchao


def test_int8_on_top_of_a_reduction(small, tmp_path):
    torchao = pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    small.save_pretrained(tmp_path)
    wanted = outputs(small)
    quantized = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
    )
    kinds = {type(module.weight).__name__ for module in quantized.modules() if isinstance(module, torch.nn.Linear)}
    assert any("Int8" in kind or "Affine" in kind for kind in kinds), (kinds, torchao.__version__)
    batch = zoo.batches("bert", 1)[0]
    with torch.no_grad():
        found = quantized(**batch).logits
    assert 0 < (found - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_an_int8_table_of_short_rows(small):
    """Rows and projection are quantised each as what it is."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    wanted = outputs(small)
    quantize_(small, Int8WeightOnlyConfig(), filter_fn=lambda module, name: "word_embeddings" in name)
    found = outputs(small)
    assert 0 < (found - wanted).abs().max() < 0.05 * wanted.abs().max()


# sentence-transformers


def save_encoder(folder):
    model = narrow_to(zoo.make("bert", "Model"), zoo.batches("bert", 2), WIDTHS, RECIPE, progress=False)
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a good bad film and plot".split()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    model.save_pretrained(folder / "encoder")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder / "encoder")
    return model


def test_sentence_transformers(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    model = save_encoder(tmp_path)
    encoder = st.SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    texts = ["a good film", "a bad plot and a bad film"]
    found = encoder.encode(texts)
    assert found.shape == (2, 20) and encoder.get_embedding_dimension() == 20
    batch = encoder.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    assert torch.allclose(torch.from_numpy(found), (states * mask).sum(1) / mask.sum(1), atol=1e-5)
    encoder.save_pretrained(str(tmp_path / "saved"))
    again = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert (again.encode(texts) == found).all() and again.get_embedding_dimension() == 20
    assert (tmp_path / "saved" / "modeling_rmtkd.py").is_file()


# evaluate


METRIC = """
import datasets
import evaluate


class Share(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"share": sum(p == r for p, r in zip(predictions, references)) / len(references)}
"""


def trainer_of(folder, **changes):
    kwargs = {"train_dataset": toy_data(), "eval_dataset": toy_data(16, seed=2)} | changes.pop("kwargs", {})
    args = RMTKDTrainingArguments(str(folder), max_steps=4, **QUIET, **changes)
    return RMTKDTrainer(model=tiny_bert(), args=args, rmtkd_config=RECIPE, **kwargs)


def test_evaluate_metrics_judge_the_stages(tmp_path):
    evaluate = pytest.importorskip("evaluate")
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "share.py").write_text(METRIC)
    metric = evaluate.load(str(tmp_path / "share"), cache_dir=str(tmp_path / "cache"))

    def compute(prediction):
        return metric.compute(predictions=prediction.predictions.argmax(-1), references=prediction.label_ids)

    trainer = trainer_of(tmp_path / "out", metric_for_best_model="share", kwargs={"compute_metrics": compute})
    trainer.train()
    logits = trainer.predict(trainer.eval_dataset).predictions
    wanted = (logits.argmax(-1) == [row["labels"] for row in trainer.eval_dataset]).mean()
    assert trainer.stages[-1].metric_name == "eval_share"
    assert trainer.stages[-1].metric_after == pytest.approx(wanted)


# Trackers


def test_tensorboard_gets_terms_and_stages(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer_of(tmp_path / "out", report_to=["tensorboard"]).train()
    events = EventAccumulator(str(next((tmp_path / "events").rglob("events.out.*")).parent)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/loss/kl", "train/loss/hidden", "train/loss/task"} <= tags
    assert any(tag.endswith("rmtkd/parameters") for tag in tags)
    assert [event.step for event in events.Scalars("train/loss/kl")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_trackio_gets_terms(tmp_path, as_user, hub):
    pytest.importorskip("trackio")
    done = as_user(hub, "track.py", tmp_path)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(found["kl"]) == 4 and all(value >= 0 for value in found["kl"])
    assert found["stages"] == 1


# datasets


def test_streaming_data_calibrate_and_train(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{k: v if isinstance(v, int) else v.tolist() for k, v in row.items()} for row in toy_data()]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    stream = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "rows.parquet"), split="train", streaming=True, cache_dir=str(tmp_path)
    )
    assert isinstance(stream, datasets.IterableDataset)
    loader = torch.utils.data.DataLoader(stream.with_format("torch"), batch_size=8)
    listed = torch.utils.data.DataLoader(toy_data(), batch_size=8)
    recipe = RECIPE.replace(calibration_samples=16)
    first, second = (narrow(tiny_bert(), data, recipe, progress=False) for data in (loader, listed))
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())
    trainer = trainer_of(tmp_path / "out", report_to=[], kwargs={"train_dataset": stream})
    assert trainer.train().metrics["reduction"] > 0.3
