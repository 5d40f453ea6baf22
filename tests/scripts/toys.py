"""Small tasks that a tiny model learns in a hundred steps, as local files; tiny models and tokenizers for them.

Each function takes a folder, writes its files, and returns the options of a script that name them; `corpus` holds
every word there is.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


NOUNS = "film plot cast score ending song scene idea story actor".split()
GOOD = "great lovely fine warm bright funny clever moving fresh sweet".split()
BAD = "awful dull poor cold dark boring silly weak stale bitter".split()
TOPICS = {
    "music": "melody drummer concert chorus violin".split(),
    "sport": "striker goalkeeper referee stadium marathon".split(),
    "food": "recipe kitchen pepper dessert noodle".split(),
    "space": "rocket comet orbit galaxy telescope".split(),
}
FIRST_NAMES = "anna boris clara dmitri elena farid greta hugo irene jakob".split()
LAST_NAMES = "adler becker castro dupont eriksen fischer garcia hansen ito jensen".split()
TOWNS = "paris oslo lima cairo delhi tokyo quito sofia accra hanoi".split()
PLACES = "north south upper lower old".split()
SIZES = "small large old young tired".split()
KINDS = {
    "animal": ("tame wild shy".split(), "cat dog horse sheep goat mouse".split()),
    "tool": ("wooden heavy rusty".split(), "hammer saw drill wrench ladder rope".split()),
    "fruit": ("ripe sour juicy".split(), "apple pear plum cherry grape melon".split()),
}
FILLERS = "there was something in the yard and then later near a wall on that day".split()
ACTORS = {
    "dog": ("barks", "garden"),
    "cat": ("sleeps", "basket"),
    "horse": ("runs", "meadow"),
    "owl": ("waits", "forest"),
    "baker": ("kneads", "bakery"),
    "sailor": ("steers", "harbour"),
}
GLUE = "the is and it which that sees lives visited from . ? about".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def corpus() -> list[str]:
    """Every word, once a line."""
    listed = [NOUNS, GOOD, BAD, *TOPICS.values(), TOPICS, FIRST_NAMES, LAST_NAMES, TOWNS, PLACES, SIZES]
    listed += [words for kind in KINDS.values() for words in kind]
    listed += [KINDS, FILLERS, ACTORS, *ACTORS.values(), GLUE, ["good", "bad"]]
    return sorted({word for words in listed for word in words})


# -- data -------------------------------------------------------------------------------------------------------------

Row = dict[str, object]


def praise(draw: random.Random, i: int) -> tuple[str, int]:
    """ "the film is great and warm", 1 for praise."""
    words = GOOD if i % 2 else BAD
    return f"the {draw.choice(NOUNS)} is {' and '.join(draw.choices(words, k=draw.randint(1, 3)))}", i % 2


def sentences(draw: random.Random, i: int) -> Row:
    text, label = praise(draw, i)
    return {"sentence": text, "label": label}


def grades(draw: random.Random, i: int) -> Row:
    """How many of three words praise."""
    good = [draw.random() < 0.5 for _ in range(3)]
    words = [draw.choice(GOOD if praises else BAD) for praises in good]
    return {"sentence": f"the {draw.choice(NOUNS)} is {' and '.join(words)}", "label": float(sum(good))}


def pairs(draw: random.Random, i: int) -> Row:
    """The second sentence decides; the first one tells nothing."""
    second, label = praise(draw, i)
    return {"sentence1": f"{draw.choice(FIRST_NAMES)} sees {draw.choice(TOWNS)}", "sentence2": second, "label": label}


def topics(draw: random.Random, i: int) -> Row:
    """Two columns of words, and the name of their topic; one is rare."""
    kinds = list(TOPICS)
    label = kinds[i % len(kinds)] if draw.random() < 0.6 else kinds[0]
    words = draw.choices(TOPICS[label], k=2) + draw.choices(FILLERS, k=3)
    draw.shuffle(words)
    return {"title": draw.choice(NOUNS), "body": " ".join(words), "label": label}


def several_topics(draw: random.Random, i: int) -> Row:
    labels = draw.sample(list(TOPICS), k=draw.randint(1, 2))
    words = [draw.choice(TOPICS[label]) for label in labels for _ in range(2)] + draw.choices(FILLERS, k=3)
    draw.shuffle(words)
    return {"title": draw.choice(NOUNS), "body": " ".join(words), "label": labels}


def names(draw: random.Random, i: int) -> Row:
    """Words with their tags; the pieces that the tokenizer cuts them into have none."""
    person = [draw.choice(FIRST_NAMES)] + ([draw.choice(LAST_NAMES)] if draw.random() < 0.6 else [])
    town = ([draw.choice(PLACES)] if draw.random() < 0.5 else []) + [draw.choice(TOWNS)]
    tagged = [(word, "PER") for word in person], [(word, "LOC") for word in town]
    tokens, tags = [], []
    for verb, part in ((("the", "actor"), tagged[0]), (("visited",), tagged[1])):
        tokens += [*verb, *(word for word, _ in part)]
        tags += ["O"] * len(verb) + [f"{'I' if k else 'B'}-{kind}" for k, (_, kind) in enumerate(part)]
    tail = draw.choices(FILLERS, k=draw.randint(1, 3))
    return {"tokens": [*tokens, *tail], "ner_tags": [*tags, *["O"] * len(tail)]}


def questions(draw: random.Random, i: int) -> Row:
    """Which animal? In the text stands "tame cat", among others. Some texts are longer than a feature."""
    kind = draw.choice(list(KINDS))
    things = {k: " ".join(map(draw.choice, words)) for k, words in KINDS.items()}
    parts = list(things.values())
    draw.shuffle(parts)
    count = draw.randint(6, 9) if i % 8 == 0 else draw.randint(1, 2)
    context = " . ".join(f"{' '.join(draw.choices(FILLERS, k=count))} {part}" for part in parts) + " ."
    start = context.index(things[kind])
    answers = {"text": [things[kind]], "answer_start": [start]}
    return {"id": f"q{i}", "question": f" which {kind} ?", "context": context, "answers": answers}


def endings(draw: random.Random, i: int) -> Row:
    """The ending that praises is the right one."""
    right = draw.randrange(4)
    texts = [draw.choice(GOOD if k == right else BAD) for k in range(4)]
    row = {"sent1": f"{draw.choice(FIRST_NAMES)} sees {draw.choice(TOWNS)}", "sent2": f"the {draw.choice(NOUNS)} is"}
    return row | {f"ending{k}": text for k, text in enumerate(texts)} | {"label": right}


def lines(draw: random.Random, i: int) -> str:
    """Who it is says what is done, and where."""
    who = draw.choice(list(ACTORS))
    what, where = ACTORS[who]
    return f"the {draw.choice(SIZES)} {who} {what} in the {where}"


def documents(draw: random.Random, i: int) -> Row:
    """A topic and an opinion; the summary names both."""
    topic, good = draw.choice(list(TOPICS)), draw.random() < 0.5
    words = draw.choices(TOPICS[topic], k=2) + draw.choices(GOOD if good else BAD, k=2) + draw.choices(FILLERS, k=2)
    draw.shuffle(words)
    return {"document": " ".join(words), "summary": f"{topic} is {'good' if good else 'bad'}"}


def _rows(make: Callable, count: int, seed: int) -> list:
    draw = random.Random(seed)
    return [make(draw, i) for i in range(count)]


def _splits(train: int, validation: int) -> Iterable[tuple[str, int, int]]:
    return (("train", train, 0), ("validation", validation, 1))


def json_files(make: Callable[..., Row], train: int = 512, validation: int = 128) -> Callable[[Path], dict[str, Path]]:
    def write(folder: Path) -> dict[str, Path]:
        for split, count, seed in _splits(train, validation):
            text = "\n".join(json.dumps(row) for row in _rows(make, count, seed))
            (folder / f"{split}.json").write_text(text + "\n", encoding="utf8")
        return {f"{split}_file": folder / f"{split}.json" for split in ("train", "validation")}

    return write


def csv_files(make: Callable[..., Row], train: int = 512, validation: int = 128) -> Callable[[Path], dict[str, Path]]:
    def write(folder: Path) -> dict[str, Path]:
        for split, count, seed in _splits(train, validation):
            rows = _rows(make, count, seed)
            with (folder / f"{split}.csv").open("w", newline="", encoding="utf8") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        return {f"{split}_file": folder / f"{split}.csv" for split in ("train", "validation")}

    return write


def text_files(make: Callable[..., str], train: int = 512, validation: int = 128) -> Callable[[Path], dict[str, Path]]:
    def write(folder: Path) -> dict[str, Path]:
        for split, count, seed in _splits(train, validation):
            (folder / f"{split}.txt").write_text("\n".join(_rows(make, count, seed)) + "\n", encoding="utf8")
        return {f"{split}_file": folder / f"{split}.txt" for split in ("train", "validation")}

    return write


def image_folders(folder: Path) -> dict[str, Path]:
    """Grey pictures of 16 x 16: stripes one way or the other, or a bright disc; with noise."""
    import numpy as np
    from PIL import Image

    generator, (y, x) = np.random.default_rng(0), np.mgrid[:16, :16]
    for split, count in (("train", 240), ("validation", 90)):
        for i in range(count):
            phase = generator.integers(4)
            patterns = {
                "across": (y + phase) // 2 % 2,
                "down": (x + phase) // 2 % 2,
                "disc": (y - 5 - phase) ** 2 + (x - 5 - phase) ** 2 < 20,
            }
            label = list(patterns)[i % 3]
            values = 60 + 120 * patterns[label] + generator.normal(0, 25, (16, 16))
            place = folder / split / label
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.clip(0, 255).astype("uint8")).save(place / f"{i}.png")
    return {f"{split}_dir": folder / split for split in ("train", "validation")}


# -- models -----------------------------------------------------------------------------------------------------------


def train_tokenizer(folder: Path, texts: Sequence[str], pairs: bool = True) -> int:
    """A small WordPiece tokenizer, saved; rare words come in pieces. Returns the size of its vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    frequent = [word for word in texts if word not in LAST_NAMES]
    trainer = trainers.WordPieceTrainer(
        vocab_size=1000, min_frequency=20, special_tokens=SPECIAL, show_progress=False, limit_alphabet=64
    )
    tokenizer.train_from_iterator([*frequent * 20, *texts], trainer)
    special = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    one, two = ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1") if pairs else ("$A [SEP]", "$A [SEP] $B [SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(single=one, pair=two, special_tokens=special)
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if pairs else ["input_ids", "attention_mask"]
    tokens = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    tokens |= {"cls_token": "[CLS]", "sep_token": "[SEP]"} if pairs else {"eos_token": "[SEP]", "bos_token": "[CLS]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, model_input_names=inputs, **tokens)
    fast.save_pretrained(folder)
    return len(fast)


WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,  # as large as makes a hundred steps enough, and attention worth keeping
}


def save_bert(folder: Path) -> None:
    """A backbone without a head, as a pretrained one comes; its weights are random."""
    import torch
    from transformers import BertConfig, BertModel

    size = train_tokenizer(folder, corpus())
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=size, max_position_embeddings=64, **WIDTHS)).save_pretrained(folder)


def save_vit(folder: Path) -> None:
    import torch
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    torch.manual_seed(0)
    ViTModel(ViTConfig(image_size=16, patch_size=4, **WIDTHS)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)


def save_t5(folder: Path) -> None:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    size = train_tokenizer(folder, corpus(), pairs=False)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=size,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=3,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)


def save_bart(folder: Path) -> None:
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    size = train_tokenizer(folder, corpus(), pairs=False)
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=size,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=3,
        forced_eos_token_id=3,
    )
    BartForConditionalGeneration(config).save_pretrained(folder)
