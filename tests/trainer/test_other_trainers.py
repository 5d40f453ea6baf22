"""The mixin in front of TRL's SFTTrainer, with its defaults: bf16, activation checkpointing, a head without logits."""

from __future__ import annotations

import functools

import datasets
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_rmtkd import RMTKDConfig, RMTKDError, RMTKDMixin
from optimum_rmtkd.distillation import KLDivergence, TaskLoss

from ..tables import SLOW
from .test_own_loss import terms


trl = pytest.importorskip("trl", reason="needs the extra trl")

WORDS = [f"w{n}" for n in range(40)]
SPECIAL = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}a {% generation %}{{ m.content }} </s>{% endgeneration %}"
    "{% else %}u {{ m.content }} {% endif %}{% endfor %}"
)
NONE = {"schedule": "none", "target_reduction": None}


class SFT(RMTKDMixin, trl.SFTTrainer):
    pass


def tiny_llama(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 2, "eos_token_id": 1, "bos_token_id": None}
    given = {"vocab_size": 48, "max_position_embeddings": 256, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**(sizes | ids | given | changes)))


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "</s>", "<pad>", "u", "a", *WORDS]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=CHAT, model_max_length=256, **SPECIAL)


def sentences(samples=48, seed=0):
    """Counting on from a random word: the next word can be known."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 40, (samples,), generator=generator).tolist()
    lengths = torch.randint(4, 12, (samples,), generator=generator).tolist()
    return [" ".join(WORDS[(s + i) % 40] for i in range(n)) for s, n in zip(starts, lengths, strict=True)]


def texts(samples=48, seed=0):
    return datasets.Dataset.from_dict({"text": sentences(samples, seed)})


@pytest.fixture
def make_sft(tmp_path, tokenizer):
    def make(model=None, recipe=None, data=None, out="out", given=None, **arguments):
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
        usual = {"form": "factored", "target_reduction": 0.2, "calibration_samples": 16, "round_to": 4, "min_width": 4}
        usual["fit_share"] = 0.0
        rest = {"train_dataset": texts(), "eval_dataset": texts(16, 1), "processing_class": tokenizer}
        trainer = SFT(
            model=tiny_llama() if model is None else model,
            args=trl.SFTConfig(str(tmp_path / out), **arguments),
            rmtkd_config=RMTKDConfig(**(usual | (recipe or {}))),
            **(rest | (data or {}) | (given or {})),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    return make


def test_its_defaults(make_sft, tmp_path):
    trainer = make_sft(recipe={"target_reduction": 0.3}, save_strategy="steps", save_steps=3)
    assert trainer.args.bf16 and trainer.args.gradient_checkpointing
    metrics = trainer.train().metrics
    assert metrics["reduction"] > 0.25 and trainer.stages[-1].status == "accepted"
    for line in terms(trainer):
        assert {"loss/task", "loss/kl", "entropy", "mean_token_accuracy", "num_tokens"} <= set(line)
    trainer.save_model(str(tmp_path / "final"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    batch = {"input_ids": torch.arange(5, 25)[None]}
    with torch.no_grad():
        ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-6")(**batch).logits
        torch.testing.assert_close(again(**batch).logits, ours)
    assert (tmp_path / "out" / "README.md").is_file()


def test_a_model_by_name_and_no_arguments(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # on a machine without a GPU its default, bfloat16, asks for this
    monkeypatch.setattr("trl.trainer.sft_trainer.SFTConfig", functools.partial(trl.SFTConfig, use_cpu=True))
    tiny_llama().save_pretrained("mine")
    tokenizer.save_pretrained("mine")
    recipe = RMTKDConfig(form="factored", target_reduction=0.2)
    trainer = SFT(model="mine", train_dataset=texts(), rmtkd_config=recipe)
    assert isinstance(trainer.args, trl.SFTConfig) and trainer.args.gradient_checkpointing
    assert trainer.args.output_dir == "mine-SFT" and trainer.model.config.vocab_size == 48


@pytest.mark.parametrize("bf16", [False, True])
def test_the_divergence_trains_the_student(make_sft, bf16):
    """The loss of TRL's compute_loss comes from a pass without logits, and its outputs from one without gradient."""
    objectives = [TaskLoss(0.01), KLDivergence(10.0)]
    given = {"teacher_model": tiny_llama(seed=5), "objectives": objectives}
    trainer = make_sft(recipe=NONE, given=given, max_steps=30, learning_rate=5e-3, bf16=bf16)
    trainer.train()
    first, *_, last = (line["loss/kl"] for line in terms(trainer))
    assert last < first / 2


def test_the_task_term_is_its_own_loss(make_sft):
    given = {"teacher_model": tiny_llama(seed=5)}
    trainer = make_sft(recipe=NONE, given=given, max_steps=1, bf16=False, learning_rate=0.0)
    trainer.train()
    (line,) = terms(trainer)
    plain = trl.SFTTrainer(
        model=tiny_llama(),
        args=trl.SFTConfig(
            trainer.args.output_dir,
            max_steps=1,
            per_device_train_batch_size=8,
            learning_rate=0.0,
            bf16=False,
            use_cpu=True,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
        ),
        train_dataset=texts(),
        processing_class=trainer.processing_class,
    )
    plain.train()
    assert line["loss/task"] == pytest.approx(plain.state.log_history[0]["loss"], rel=1e-5)
    assert line["mean_token_accuracy"] == plain.state.log_history[0]["mean_token_accuracy"]


def test_the_task_term_over_accumulated_batches_is_a_mean_over_labels(make_sft):
    lines = []
    for size, steps in ((8, 1), (2, 4)):
        trainer = make_sft(
            recipe=NONE,
            given={"teacher_model": tiny_llama(seed=5)},
            max_steps=1,
            bf16=False,
            learning_rate=1e-3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        trainer.train()
        lines += terms(trainer)
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=1e-4)
    assert lines[0]["grad_norm"] == pytest.approx(lines[1]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "max_length": 32},
        SLOW({"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
        {"padding_free": True, "max_length": None},
        {"loss_type": "dft"},
        SLOW({"gradient_checkpointing": False, "neftune_noise_alpha": 5.0}),
        {"gradient_checkpointing_kwargs": {"selective": True}},
    ],
    ids=lambda options: ",".join(options),
)
def test_its_options(make_sft, options):
    trainer = make_sft(max_steps=3, **options)
    trainer.train()
    assert trainer.stages[-1].status == "accepted"
    assert all(torch.isfinite(torch.tensor(line["loss/kl"])) for line in terms(trainer))


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_losses_of_a_part_of_the_tokens(make_sft, kind):
    """The divergence is taken where the labels are."""
    rows = [text.split() for text in sentences(8)]  # one batch, however shuffled
    if kind == "chat":
        content = [(" ".join(row[:3]), " ".join(row[3:])) for row in rows]
        said = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in content]
        data, options = datasets.Dataset.from_dict({"messages": said}), {"assistant_only_loss": True}
    else:
        data = datasets.Dataset.from_dict(
            {"prompt": [" ".join(r[:3]) for r in rows], "completion": [" " + " ".join(r[3:]) for r in rows]}
        )
        options = {}
    teacher = tiny_llama(seed=5)
    trainer = make_sft(
        recipe=NONE,
        data={"train_dataset": data, "eval_dataset": None},
        given={"teacher_model": teacher, "objectives": [TaskLoss(1.0), KLDivergence(1.0)]},
        max_steps=1,
        bf16=False,
        learning_rate=0.0,
        **options,
    )
    student, seen = trainer.model, []
    original = trainer.data_collator

    def collate(rows):
        seen.append(original(rows))
        return {name: value.clone() for name, value in seen[-1].items()}

    trainer.data_collator = collate
    trainer.train()
    (line,) = terms(trainer)
    batch = seen[-1]
    labels = batch["labels"][:, 1:]
    assert 0 < int((labels != -100).sum()) < int(batch["attention_mask"].sum()) - len(labels)
    with torch.no_grad():
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        ours, theirs = (F.log_softmax(m.eval()(**inputs).logits[:, :-1].float(), -1) for m in (student, teacher))
    each = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    assert line["loss/kl"] == pytest.approx(float(each[labels != -100].mean()), rel=1e-4)


def test_a_run_is_resumed(make_sft, tmp_path, weights):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make_sft(out="whole", **options)
    whole.train()
    again = make_sft(out="again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, tensor in weights(again.model).items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name


def test_the_best_model_is_one_after_the_cut(make_sft):
    trainer = make_sft(
        max_steps=6,
        save_strategy="steps",
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    evaluated = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluated), rel=1e-2)


def test_what_the_stages_measure_is_not_in_its_next_evaluation(make_sft):
    trainer = make_sft(max_steps=2, eval_strategy="steps", eval_steps=2, bf16=False)
    trainer.train()
    logged = [line["eval_mean_token_accuracy"] for line in trainer.state.log_history if "eval_loss" in line][-1]
    trainer.evaluate()
    assert logged == pytest.approx(trainer.state.log_history[-1]["eval_mean_token_accuracy"], rel=1e-5)


def test_an_untied_head(make_sft):
    """TRL multiplies by the weight of the head itself."""
    trainer = make_sft(model=tiny_llama(tie_word_embeddings=False))
    trainer.train()
    assert trainer.stages[-1].status == "accepted"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.stages[-1].metric_after, rel=2e-2)


def test_adapters_are_trained_and_not_cut(make_sft):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    with pytest.raises(RMTKDError, match="merge_and_unload"):
        make_sft(given={"peft_config": adapter})
    trainer = make_sft(recipe=NONE, given={"peft_config": adapter, "teacher_model": tiny_llama(seed=5)}, max_steps=2)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("lora_" in name for name in changed)


@pytest.mark.parametrize("kind", ["DPO", "Reward"])
def test_trainers_of_preferences(tmp_path, tokenizer, kind):
    """Their losses read columns of their own, and no labels."""
    trainer_behind, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    trainer_class = type("Preferring", (RMTKDMixin, trainer_behind), {})
    classify = {"num_labels": 1} if kind == "Reward" else {}
    tiny_llama().save_pretrained(tmp_path / "model")
    auto = transformers.AutoModelForSequenceClassification if classify else transformers.AutoModelForCausalLM
    halves = [(" ".join(text.split()[:2]) + " ", " ".join(text.split()[2:])) for text in sentences()]
    rows = {"prompt": [h[0] for h in halves], "chosen": [h[1] for h in halves], "rejected": ["w1 w1"] * len(halves)}
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "bf16": False, "use_cpu": True, "report_to": []}
    trainer = trainer_class(
        model=auto.from_pretrained(tmp_path / "model", **classify),
        args=config(str(tmp_path / "out"), save_strategy="no", logging_steps=1, **options),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer,
        rmtkd_config=RMTKDConfig(
            form="factored", target_reduction=0.2, calibration_samples=16, round_to=4, min_width=4, fit_share=0.0
        ),
    )
    trainer.train()
    assert trainer.stages[-1].status == "accepted" and all("loss/kl" in line for line in terms(trainer))


def test_answers_in_chunks_beside_a_loss_without_logits(make_sft, caplog):
    teacher = tiny_llama(1)

    def logs(chunk):
        trainer = make_sft(
            recipe=NONE | {"logits_chunk": chunk},
            given={"teacher_model": teacher},
            max_steps=3,
            bf16=False,
            out=f"o{chunk}",
        )
        head, positions = trainer.model.get_output_embeddings(), []
        head.register_forward_hook(lambda module, args, output: positions.append(output.numel() // output.shape[-1]))
        trainer.train()
        return [
            {k: v for k, v in line.items() if k.startswith("loss")} for line in trainer.state.log_history
        ], positions

    whole, chunks = logs(None), logs(7)
    for ours, theirs in zip(chunks[0], whole[0], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)
    assert max(chunks[1]) <= 8 < max(whole[1])  # one position of each of eight rows, beside the chunks
    assert "kept in memory" not in caplog.text
