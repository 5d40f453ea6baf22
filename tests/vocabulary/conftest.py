"""Tokenizers of every kind trained on small made-up text, and tiny random models of several families."""

from __future__ import annotations

import random

import pytest


SYLLABLES = "ba ke li mo nu ra si to vu ze".split()
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def made_up(count: int, seed: int) -> list[str]:
    """Words of two to four syllables."""
    draw = random.Random(seed)
    return ["".join(draw.choices(SYLLABLES, k=draw.randint(2, 4))) for _ in range(count)]


def sentences(words: list[str], count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(3, 8))) for _ in range(count)]


WORDS = made_up(150, seed=0)
CORPUS = sentences(WORDS, 600, seed=1)
DOMAIN = sentences(WORDS[:25], 60, seed=2)  # uses a sixth of the words
ELSEWHERE = sentences(WORDS, 60, seed=3)


def wordpiece():
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizer

    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(CORPUS, vocab_size=250, min_frequency=1, show_progress=False)
    return BertTokenizer(vocab=trained.get_vocab())


def byte_level():
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaTokenizer

    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(CORPUS, vocab_size=450, min_frequency=1, special_tokens=special, show_progress=False)
    return RobertaTokenizer(vocab=trained.get_vocab(), merges=merges_of(trained))


def gpt2():
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Tokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        CORPUS, vocab_size=450, min_frequency=1, special_tokens=["<|endoftext|>"], show_progress=False
    )
    return GPT2Tokenizer(vocab=trained.get_vocab(), merges=merges_of(trained), pad_token="<|endoftext|>")


def byte_fallback():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    return LlamaTokenizer(vocab=trained.get_vocab(), merges=merges_of(trained), pad_token="</s>")


def unigram():
    from transformers import XLMRobertaTokenizer

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    return XLMRobertaTokenizer(vocab=[*((token, 0.0) for token in special), *unigram_pieces(), ("<mask>", 0.0)])


def t5():
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    extra = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(10))]
    return T5Tokenizer(vocab=[*special, *unigram_pieces(), *extra], extra_ids=10)


def clip():
    """Merged with a mark at the end of words."""
    from tokenizers import CharBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = CharBPETokenizer()
    trained.train_from_iterator(CORPUS, vocab_size=250, min_frequency=1, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, unk_token="<unk>", pad_token="<unk>")


def word_level():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<unk>", "<pad>", *dict.fromkeys(WORDS)])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


def merges_of(trained) -> list[tuple[str, str]]:
    import json

    inner = getattr(trained, "_tokenizer", trained)
    return [tuple(pair) for pair in json.loads(inner.to_str())["model"]["merges"]]


def unigram_pieces() -> list[tuple[str, float]]:
    """Pieces and scores of a SentencePiece-like model."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=250, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False),
    )
    vocab = json.loads(trained.to_str())["model"]["vocab"]
    return [(piece, score) for piece, score in vocab if piece != "<unk>"]


TOKENIZERS = {f.__name__: f for f in (wordpiece, byte_level, gpt2, byte_fallback, unigram, t5, clip, word_level)}


@pytest.fixture(scope="session")
def tokenizers():
    """name -> tokenizer, each made once; copies, so that no test changes another's."""
    import copy

    made = {}

    def get(name: str):
        if name not in made:
            made[name] = TOKENIZERS[name]()
        return copy.deepcopy(made[name])

    return get


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def families() -> dict:
    """name -> (class, options of its config beside the ids)."""
    import transformers as t

    bart = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
    bart |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    distil = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    return {
        "bert": (t.BertForSequenceClassification, SMALL),
        "bert_mlm": (t.BertForMaskedLM, SMALL),
        "bert_mlm_untied": (t.BertForMaskedLM, SMALL | {"tie_word_embeddings": False}),
        "roberta": (t.RobertaForSequenceClassification, SMALL),
        "xlm_roberta_mlm": (t.XLMRobertaForMaskedLM, SMALL),
        "distilbert_mlm": (t.DistilBertForMaskedLM, distil),
        "electra": (t.ElectraForMaskedLM, SMALL | {"embedding_size": 16}),
        "albert_mlm": (t.AlbertForMaskedLM, SMALL | {"embedding_size": 16}),
        "gpt2": (t.GPT2LMHeadModel, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
        "llama": (t.LlamaForCausalLM, SMALL | {"num_key_value_heads": 2}),
        "t5": (t.T5ForConditionalGeneration, t5),
        "t5_untied": (t.T5ForConditionalGeneration, t5 | {"tie_word_embeddings": False}),
        "bart": (t.BartForConditionalGeneration, bart),
        "m2m100": (t.M2M100ForConditionalGeneration, bart),
    }


def further_families() -> dict:
    """Those with tables of more kinds, or ids of more names: for slow tests."""
    import transformers as t

    xlm = {"emb_dim": 32, "n_layers": 2, "n_heads": 4}
    mobile = {"embedding_size": 16, "true_hidden_size": 32, "intra_bottleneck_size": 32}
    opt = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    return {
        "xlm": (t.XLMWithLMHeadModel, xlm | {"n_langs": 3, "use_lang_emb": True}),
        "mobilebert": (t.MobileBertForMaskedLM, SMALL | mobile),
        "deberta": (t.DebertaForMaskedLM, SMALL),
        "mpnet": (t.MPNetForMaskedLM, SMALL),
        "rembert": (t.RemBertForMaskedLM, SMALL | {"input_embedding_size": 16, "output_embedding_size": 24}),
        "xlnet": (t.XLNetLMHeadModel, {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
        "modernbert": (t.ModernBertForMaskedLM, SMALL | {"local_attention": 8}),
        "gpt_neox": (t.GPTNeoXForCausalLM, SMALL),
        "opt": (t.OPTForCausalLM, opt | {"word_embed_proj_dim": 16}),
        "gemma": (t.GemmaForCausalLM, SMALL | {"num_key_value_heads": 2, "head_dim": 8}),
        "mamba": (t.MambaForCausalLM, {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    }


def tiny(name: str, tokenizer, rows: int | None = None, **changes):
    """A random model of a family with a row for each token (or `rows`), in eval mode."""
    import torch

    cls, options = (families() | further_families())[name]
    special = {
        f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id", None)
        for kind in ("bos", "eos", "pad", "sep", "cls")
    }
    special = {name: i for name, i in special.items() if i is not None}
    if cls.config_class().is_encoder_decoder:
        special["decoder_start_token_id"] = special.get("pad_token_id", 0)
    torch.manual_seed(0)
    config = cls.config_class(vocab_size=rows or len(tokenizer), **(options | special | changes))
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms as well: zeros hide a wrong row
            parameter.copy_(0.2 * torch.randn(parameter.shape) + (parameter.dim() == 1))
    return model
