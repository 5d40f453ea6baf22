"""A classifier on the features of a frozen text encoder, its hidden weights -1, 0 or 1 and never trained.

    python examples/ternary_head.py --model ./all-MiniLM-L6-v2 --train_file ag_news_train.parquet \\
        --test_file ag_news_test.parquet --output_dir out --hidden 1000 1000 1000

`--recipe FILE` reads any field of `TernaryConfig` from JSON. The encoder runs once over the data; the ternary network
is fitted to its mean token in seconds: hidden layers are drawn from a seed, only the readout is solved for, by ridge
regression. Two other readouts are printed beside it: the same network with dense Gaussian weights, and ridge
regression on the features themselves. If the last one is as good, take it: it is smaller still.

The saved folder reloads with `AutoModel.from_pretrained(out)` after `import optimum_rmtkd`, or with
trust_remote_code=True.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, HfArgumentParser

from optimum_rmtkd import TernaryConfig, compress_features


@dataclass
class EncoderArguments:
    model: str = field(metadata={"help": "Hub name or local folder of a text encoder."})
    train_file: str = field(
        metadata={"help": "Table with a column of texts and one of classes (csv, json or parquet)."}
    )
    test_file: str = field(metadata={"help": "The same, to measure on."})
    output_dir: str = field(metadata={"help": "Folder of the fitted network."})
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    label_column: str = field(default="label", metadata={"help": "Column of the classes, as numbers."})
    rows: int = field(default=8000, metadata={"help": "Rows of each table at most."})
    max_length: int = field(default=64, metadata={"help": "Longer texts are cut to this many tokens."})
    batch_size: int = field(default=64, metadata={"help": "Texts in one forward pass of the encoder."})


@dataclass
class NetworkArguments:
    hidden: list[int] | None = field(default=None, metadata={"help": "Widths of the hidden layers."})
    sparsity: float | None = field(default=None, metadata={"help": "Share of the hidden weights that are 0."})
    recipe: str | None = field(default=None, metadata={"help": "JSON file of fields of TernaryConfig."})

    def config(self) -> TernaryConfig:
        config = TernaryConfig.from_json_file(self.recipe) if self.recipe else TernaryConfig()
        given = {"hidden": self.hidden and tuple(self.hidden), "sparsity": self.sparsity}
        return config.replace(**{name: value for name, value in given.items() if value is not None})


def read(path: str, arguments: EncoderArguments) -> tuple[list[str], torch.Tensor]:
    """Texts, and classes (n,) int64."""
    kind = {"csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}.get(path.rpartition(".")[2])
    if kind is None:
        raise ValueError(f"{path}: expected a .csv, .json, .jsonl or .parquet file.")
    table = load_dataset(kind, data_files={"part": path})["part"]
    for column in (arguments.text_column, arguments.label_column):
        if column not in table.column_names:
            raise ValueError(f"{path} has no column {column!r}; it has {', '.join(table.column_names)}.")
    table = table.shuffle(seed=0).select(range(min(arguments.rows, len(table))))
    return table[arguments.text_column][:], torch.tensor(table[arguments.label_column][:])


@torch.no_grad()
def encode(texts: list[str], model, tokenizer, arguments: EncoderArguments) -> torch.Tensor:
    """(n, d): mean of the last hidden states over the tokens of each text."""
    pooled = []
    for start in tqdm(range(0, len(texts), arguments.batch_size), desc="encoding"):
        batch = texts[start : start + arguments.batch_size]
        inputs = tokenizer(batch, truncation=True, max_length=arguments.max_length, padding=True, return_tensors="pt")
        inputs = inputs.to(model.device)
        mask = inputs["attention_mask"][..., None]
        pooled.append(((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)).float().cpu())
    return torch.cat(pooled)


def linear_readout(x: torch.Tensor, y: torch.Tensor, ridge: float = 1e-3):
    """Features -> scores, by ridge regression, the ridge relative to the mean variance of a feature."""
    mean, classes = x.double().mean(0), torch.nn.functional.one_hot(y).double()
    centred = x.double() - mean
    moments = centred.T @ centred
    moments += ridge * moments.diagonal().mean() * torch.eye(len(moments))
    weight = torch.linalg.solve(moments, centred.T @ (classes - classes.mean(0)))
    return lambda features: (features.double() - mean) @ weight + classes.mean(0)


@torch.no_grad()
def accuracy(head, x: torch.Tensor, y: torch.Tensor) -> str:
    scores = head(x)
    return f"{100 * float((getattr(scores, 'logits', scores).argmax(1) == y).float().mean()):.2f} %"


def main() -> None:
    parser = HfArgumentParser((EncoderArguments, NetworkArguments))
    arguments, network = parser.parse_args_into_dataclasses()
    config = network.config()

    model, tokenizer = (
        AutoModel.from_pretrained(arguments.model, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(arguments.model),
    )
    (texts, y), (test_texts, test_y) = (read(path, arguments) for path in (arguments.train_file, arguments.test_file))
    x, test_x = (encode(part, model, tokenizer, arguments) for part in (texts, test_texts))

    head, report = compress_features(x, y, config)
    head.save_pretrained(arguments.output_dir)
    twin, dense = compress_features(x, y, config.replace(storage="dense", mode="weights_only"))
    print(report.table())
    size = sum(path.stat().st_size for path in Path(arguments.output_dir).glob("*.safetensors"))
    linear = 4 * (x.shape[1] + 1) * (int(y.max()) + 1)
    print(f"{'readout':16}{'accuracy':>10}{'bytes':>14}")
    for name, fitted, weighs in (
        ("ternary", head, size),
        ("dense Gaussian", twin, dense.bytes),
        ("linear", linear_readout(x, y), linear),
    ):
        print(f"{name:16}{accuracy(fitted, test_x, test_y):>10}{weighs:>14,}")


if __name__ == "__main__":
    main()
