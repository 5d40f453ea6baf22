"""Tiny random decoders of every family, and text for them."""

from __future__ import annotations

import torch
import transformers as tf


TEXT = {"vocab_size": 61, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BODY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8}
GROUPED = TEXT | BODY | {"num_key_value_heads": 4}
PAIRED = GROUPED | {"head_dim": 4}
G = {
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**PAIRED)),
    "llama-tied": (tf.LlamaForCausalLM, tf.LlamaConfig(**PAIRED, tie_word_embeddings=True)),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig(**PAIRED, sliding_window=4)),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config(**GROUPED, tie_word_embeddings=True)),
    "qwen2-sliding": (
        tf.Qwen2ForCausalLM,
        tf.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config(**PAIRED)),
    "smollm3": (tf.SmolLM3ForCausalLM, tf.SmolLM3Config(**GROUPED, no_rope_layer_interval=2)),
    "granite": (
        tf.GraniteForCausalLM,
        tf.GraniteConfig(
            **GROUPED, embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0, attention_multiplier=0.2
        ),
    ),
    "gemma": (tf.GemmaForCausalLM, tf.GemmaConfig(**PAIRED)),
    "phi3": (tf.Phi3ForCausalLM, tf.Phi3Config(**GROUPED)),
    "phi3-longrope": (
        tf.Phi3ForCausalLM,
        tf.Phi3Config(
            **GROUPED,
            original_max_position_embeddings=12,
            rope_parameters={
                "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1], "long_factor": [2.0, 4.0]
            },
        ),
    ),
    "qwen2-dynamic": (
        tf.Qwen2ForCausalLM,
        tf.Qwen2Config(
            **GROUPED | {"max_position_embeddings": 16},
            rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        ),
    ),
    "stablelm": (tf.StableLmForCausalLM, tf.StableLmConfig(**GROUPED)),
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config(**G)),
    "opt": (
        tf.OPTForCausalLM,
        tf.OPTConfig(
            vocab_size=61, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0,
        ),
    ),
    "gpt_neox": (
        tf.GPTNeoXForCausalLM,
        tf.GPTNeoXConfig(**TEXT | BODY),
    ),
    "gptj": (tf.GPTJForCausalLM, tf.GPTJConfig(**G, rotary_dim=4)),
    "phi": (tf.PhiForCausalLM, tf.PhiConfig(**TEXT | BODY | {"num_attention_heads": 4, "num_key_value_heads": 4})),
    "gemma2": (tf.Gemma2ForCausalLM, tf.Gemma2Config(**PAIRED, query_pre_attn_scalar=4, sliding_window=4)),
    "gemma3": (
        tf.Gemma3ForCausalLM,
        tf.Gemma3TextConfig(**PAIRED, query_pre_attn_scalar=4, sliding_window=4, sliding_window_pattern=2),
    ),
    "olmo2": (tf.Olmo2ForCausalLM, tf.Olmo2Config(**GROUPED)),
    "cohere": (tf.CohereForCausalLM, tf.CohereConfig(**GROUPED)),
    "cohere2": (tf.Cohere2ForCausalLM, tf.Cohere2Config(**PAIRED, sliding_window=4, sliding_window_pattern=2)),
    "mixtral": (tf.MixtralForCausalLM, tf.MixtralConfig(**GROUPED, num_local_experts=4)),
}  # fmt: skip
# families that share code with one of those
KIN = {
    "ministral": (tf.MinistralForCausalLM, tf.MinistralConfig(**PAIRED, sliding_window=4)),
    "seed_oss": (tf.SeedOssForCausalLM, tf.SeedOssConfig(**PAIRED)),
    "helium": (tf.HeliumForCausalLM, tf.HeliumConfig(**PAIRED)),
    "hunyuan": (tf.HunYuanDenseV1ForCausalLM, tf.HunYuanDenseV1Config(**PAIRED)),
    "ernie": (tf.Ernie4_5ForCausalLM, tf.Ernie4_5Config(**PAIRED)),
    "cwm": (tf.CwmForCausalLM, tf.CwmConfig(**PAIRED, sliding_window=4, layer_types=["full_attention"] * 2)),
    "vaultgemma": (tf.VaultGemmaForCausalLM, tf.VaultGemmaConfig(**PAIRED, query_pre_attn_scalar=4, sliding_window=4)),
    "olmo3": (tf.Olmo3ForCausalLM, tf.Olmo3Config(**GROUPED, sliding_window=4)),
    "exaone4": (tf.Exaone4ForCausalLM, tf.Exaone4Config(**PAIRED, sliding_window=4, sliding_window_pattern=2)),
    "glm": (tf.GlmForCausalLM, tf.GlmConfig(**PAIRED)),
    "glm4": (tf.Glm4ForCausalLM, tf.Glm4Config(**PAIRED)),
    "arcee": (tf.ArceeForCausalLM, tf.ArceeConfig(**PAIRED)),
    "nemotron": (tf.NemotronForCausalLM, tf.NemotronConfig(**PAIRED)),
    "jais2": (tf.Jais2ForCausalLM, tf.Jais2Config(**PAIRED)),
    "starcoder2": (tf.Starcoder2ForCausalLM, tf.Starcoder2Config(**GROUPED)),
    "apertus": (tf.ApertusForCausalLM, tf.ApertusConfig(**GROUPED)),
    "qwen3_moe": (
        tf.Qwen3MoeForCausalLM,
        tf.Qwen3MoeConfig(**PAIRED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
    ),
    "gpt_neo": (
        tf.GPTNeoForCausalLM,
        tf.GPTNeoConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            num_heads=4,
            window_size=4,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "biogpt": (tf.BioGptForCausalLM, tf.BioGptConfig(**TEXT | BODY)),
    "olmoe": (tf.OlmoeForCausalLM, tf.OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2)),
}
EXACT = {
    "gpt2",
    "opt",
    "gpt_neox",
    "gptj",
    "phi",
    "stablelm",
    "biogpt",
    "gpt_neo",
    "nemotron",
    "jais2",
    "starcoder2",
}  # layer norms compute in the dtype they get, RMS norms in fp32

GROWING = ("gpt_neo",)  # whose own masks take the length of the cache for that of the text
NATIVE = (
    "llama-tied",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "granite",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3",
    "olmo2",
    "olmo3",
    "cohere",
    "cohere2",
    "mixtral",
)


def make(name: str, seed: int = 0) -> tf.PreTrainedModel:
    """A random model whose layers and norms matter."""
    torch.manual_seed(seed)
    cls, config = (CONFIGS | KIN)[name]
    return enlivened(cls(type(config)(**config.to_dict())))


def enlivened(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    """The same model, in place, with layers and norms that matter."""
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.dim() > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batches(count: int = 6, size: int = 8, length: int = 16, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Calibration batches, half of the texts padded at the left."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(3, 61, (size, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[::2, :3] = 0
        made.append({"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask})
    return made


@torch.no_grad()
def logits(model: tf.PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(tokens, words) at real positions."""
    return model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
