"""What users of the Hub do, each in a fresh process: `python client.py ACTION FOLDER`."""

from __future__ import annotations

import copy
import importlib.abc
import json
import pickle
import sys
from pathlib import Path


TEXTS = ["the film is great", "the plot is dull and bleak"]
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the film plot is and great dull bleak".split()


class NoPlugin(importlib.abc.MetaPathFinder):
    """As if optimum-rmtkd had never been installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "optimum_rmtkd":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def logits(model, tokenizer):
    """Logits of `TEXTS`. A copy of the model: weights read from a file lie at odd addresses, where sums are taken in
    another order."""
    import torch

    with torch.no_grad():
        return copy.deepcopy(model).eval()(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits


def equal_to_pushed(folder: Path, model, tokenizer) -> bool:
    import torch
    from safetensors.torch import load_file

    # up to the order of sums, which is not that of another process
    found, pushed = logits(model, tokenizer), load_file(folder / "logits.safetensors")["logits"]
    return found.shape == pushed.shape and torch.allclose(found, pushed, rtol=1e-5, atol=1e-5)


def push(folder: Path) -> dict:
    """Reduce a tiny random classifier and push it: whole, and in shards."""
    import torch
    from safetensors.torch import save_file
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    from optimum_rmtkd import RMTKDConfig, narrow

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf8")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    data = [tokenizer(TEXTS * 8, padding=True, return_tensors="pt")] * 4
    recipe = RMTKDConfig(target_reduction=0.5, round_to=4, min_width=4)
    model = narrow(BertForSequenceClassification(config).eval(), data, recipe, progress=False)
    save_file({"logits": logits(model, tokenizer)}, folder / "logits.safetensors")
    model.push_to_hub("user/reduced", tags=["from-the-test"])
    tokenizer.push_to_hub("user/reduced")
    model.push_to_hub("user/sharded", max_shard_size="10KB")
    tokenizer.push_to_hub("user/sharded")
    return {"parameters": model.num_parameters()}


def pull(folder: Path) -> dict:
    """Somebody who has the plugin: load, use, save, push again."""
    from huggingface_hub import HfApi
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    import optimum_rmtkd  # noqa: F401

    found = {}
    tokenizer = AutoTokenizer.from_pretrained("user/reduced")
    for name in ("user/reduced", "user/sharded"):
        model = AutoModelForSequenceClassification.from_pretrained(name)
        found[name] = equal_to_pushed(folder, model, tokenizer)
    classify = pipeline("text-classification", "user/reduced", device="cpu")
    found["pipeline"] = [[row["label"], round(row["score"], 5)] for row in classify(TEXTS)]
    best = logits(model, tokenizer).softmax(-1).max(-1)
    found["expected"] = [[model.config.id2label[int(i)], round(float(p), 5)] for p, i in zip(*best)]
    model.save_pretrained(folder / "again")
    again = AutoModelForSequenceClassification.from_pretrained(folder / "again")
    HfApi().create_repo("user/again")
    card = b"---\ntags:\n- mine\n---\n\n# Mine\n"
    HfApi().upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="user/again")
    again.push_to_hub("user/again")
    tokenizer.push_to_hub("user/again")
    return found


def stranger(folder: Path) -> dict:
    """Somebody who has never heard of the plugin."""
    sys.meta_path.insert(0, NoPlugin())
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was read")

    torch.load = pickle.load = pickle.loads = pickle.Unpickler = refuse
    found = {}
    try:
        AutoModelForSequenceClassification.from_pretrained("user/reduced")
        found["without trust"] = "loaded"
    except ValueError as error:
        found["without trust"] = str(error)
    tokenizer = AutoTokenizer.from_pretrained("user/reduced", trust_remote_code=True)
    for name in ("user/reduced", "user/sharded", "user/again"):
        model = AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=True)
        found[name] = equal_to_pushed(folder, model, tokenizer)
    classify = pipeline("text-classification", "user/reduced", trust_remote_code=True, device="cpu")
    found["pipeline"] = [[row["label"], round(row["score"], 5)] for row in classify(TEXTS)]
    model.push_to_hub("user/strangers")
    tokenizer.push_to_hub("user/strangers")
    again = AutoModelForSequenceClassification.from_pretrained("user/strangers", trust_remote_code=True)
    found["user/strangers"] = equal_to_pushed(folder, again, tokenizer)
    found["plugin"] = any(name.split(".")[0] == "optimum_rmtkd" for name in sys.modules)
    return found


def sentences() -> list[dict]:
    """Praise and blame, labelled."""
    return [
        {"sentence": f"the {noun} is {word}", "label": int(word == "great")}
        for noun in ("film", "plot") * 12
        for word in ("great", "dull")
    ]


def dense(folder: Path):
    """An uncut classifier and its tokenizer in `folder`/dense."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    torch.manual_seed(0)
    body = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **body))
    model.save_pretrained(folder / "dense")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf8")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=32)
    tokenizer.save_pretrained(folder / "dense")
    return model, tokenizer


def trainer(folder: Path) -> dict:
    """`RMTKDTrainer.push_to_hub` after a few steps."""
    from datasets import Dataset

    from optimum_rmtkd import RMTKDConfig, RMTKDTrainer, RMTKDTrainingArguments

    model, tokenizer = dense(folder)
    model.add_model_tags(["from-the-test"])
    rows = Dataset.from_list([{**tokenizer(row["sentence"]), "labels": row["label"]} for row in sentences()])
    trainer = RMTKDTrainer(
        model=model,
        args=RMTKDTrainingArguments(
            str(folder / "trained"), max_steps=6, logging_steps=2, use_cpu=True, disable_tqdm=True, report_to="none"
        ),
        rmtkd_config=RMTKDConfig(target_reduction=0.5, round_to=4, min_width=4, importance="variance"),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.push_to_hub(dataset="Praise and blame", dataset_tags="user/praise", language="en")
    return {"parameters": sum(p.numel() for p in trainer.model.parameters())}


def compress(folder: Path) -> dict:
    """`optimum-cli rmtkd compress --push-to-hub`, and its report."""
    import csv

    from optimum.commands.optimum_cli import main

    dense(folder)
    with (folder / "praise.csv").open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, ["sentence", "label"])
        writer.writeheader()
        writer.writerows(sentences())
    data = ["--train-file", str(folder / "praise.csv"), "--validation-file", str(folder / "praise.csv")]
    size = ["--target-reduction", "0.5", "--round-to", "4", "--min-width", "4", "--max-steps", "4"]
    model = ["--model", str(folder / "dense"), "-o", str(folder / "small"), "--push-to-hub", "user/small"]
    sys.argv = ["optimum-cli", "rmtkd", "compress", *model, *data, *size]
    main()
    return {"card": (folder / "small" / "README.md").read_text(encoding="utf8")}


def licenses(folder: Path) -> dict:
    """What the cards of two repositories say, one of which does not exist."""
    from huggingface_hub import HfApi

    from optimum_rmtkd.hub.card import license_of

    HfApi().create_repo("user/licensed", exist_ok=True)
    HfApi().upload_file(path_or_fileobj=b"---\nlicense: mit\n---\n", path_in_repo="README.md", repo_id="user/licensed")
    return {name: license_of(name) for name in ("user/licensed", "user/absent")}


def offline(folder: Path) -> dict:
    """The same where nobody listens."""
    from optimum_rmtkd.hub.card import license_of

    return {"user/licensed": license_of("user/licensed")}


ACTIONS = {f.__name__: f for f in (push, pull, stranger, trainer, compress, licenses, offline)}

if __name__ == "__main__":
    action, where = sys.argv[1:]
    # transformers' own question about remote code ends without a line break
    print("\n" + json.dumps(ACTIONS[action](Path(where))))
