"""Random inputs of a model, as long as somebody wants them: what it is exported and timed with."""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import RMTKDError
from .explaining import position_limit


__all__ = ["example_inputs", "longest_text", "stating", "unpadded_inputs"]


def example_inputs(model: PreTrainedModel, batch: int, length: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs of a model: token ids with a mask that pads the last row, pixels, or both where one class reads
    both; or sounds.

    Returns:
        `input_ids`, `attention_mask` (and `token_type_ids` where the model has types): (batch, length) int64;
        `pixel_values`: (batch, channels, size, size) fp32; `input_features`: (batch, bins, frames) fp32, as many
        frames as the encoder takes; or `features`: (batch, d) fp32. And `decoder_input_ids`, (batch, length) int64,
        where there is a decoder beside the encoder.

    Raises:
        RMTKDError: a model that reads something else.
    """
    generator, config = torch.Generator().manual_seed(seed), model.config
    names = inspect.signature(model.forward).parameters
    if model.main_input_name == "features":
        return {"features": torch.randn(batch, config.network["in_features"], generator=generator)}
    if model.main_input_name == "pixel_values":
        return {"pixel_values": _pixels(config, batch, generator)}
    if "input_features" in names and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        # two convolutions stand in front of the encoder, the second of stride 2
        sounds = torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
        answers = {"decoder_input_ids": _ids(config, batch, length, generator)} if "decoder_input_ids" in names else {}
        return {"input_features": sounds, **answers}
    if model.main_input_name != "input_ids" or not hasattr(stating(config, "vocab_size"), "vocab_size"):
        raise RMTKDError(
            f"{type(model).__name__} reads {model.main_input_name!r}, of which no examples can be made up: expected "
            "a model of token ids, of pixels, or of the sounds that Whisper reads."
        )
    ids = _ids(config, batch, length, generator)
    if getattr(config, "is_encoder_decoder", False) and config.eos_token_id is not None:
        # one end a text, which classifiers look for
        ids = torch.where(ids == config.eos_token_id, (ids + 1) % config.vocab_size, ids)
        ids[:, -1] = config.eos_token_id
    mask = torch.ones_like(ids)
    mask[-1, length - length // 4 :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if (getattr(config, "type_vocab_size", 0) or 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = ids.flip(1)
    if _reads_both(model):
        inputs["pixel_values"] = _pixels(config, batch, generator)
    return inputs


def stating(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """The config, or the one inside it, that has a field; the config itself where none has."""
    inside = [getattr(config, part, None) for part in getattr(config, "sub_configs", {})]
    return next((part for part in (config, *inside) if hasattr(part, name)), config)


def _reads_both(model: PreTrainedModel) -> bool:
    """Whether a class reads texts and images beside each other (CLIP)."""
    parts = {"text_config", "vision_config"} <= set(getattr(model.config, "sub_configs", {}))
    return parts and "pixel_values" in inspect.signature(model.forward).parameters


def _pixels(config: PreTrainedConfig, batch: int, generator: torch.Generator) -> torch.Tensor:
    size = getattr(stating(config, "image_size"), "image_size", 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    channels = getattr(stating(config, "num_channels"), "num_channels", 3)
    return torch.randn(batch, channels, height, width, generator=generator)


def _ids(config: PreTrainedConfig, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    words = stating(config, "vocab_size")
    ids = torch.randint(0, words.vocab_size, (batch, length), generator=generator)
    # RoBERTa counts positions by the padding token: random ids must not hold it
    padding = words.pad_token_id
    return ids if padding is None else torch.where(ids == padding, (ids + 1) % words.vocab_size, ids)


def unpadded_inputs(model: PreTrainedModel, batch: int, length: int | None) -> dict[str, torch.Tensor]:
    """The same without padding, every token being work, on the device and in the number format of the model."""
    inputs = example_inputs(model, batch, length or 1)
    inputs.pop("attention_mask", None)
    return {k: v.to(model.device, model.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}


def longest_text(model: PreTrainedModel) -> int | None:
    """Tokens of the longest text: by the tables of absolute positions, else by the config; None without either."""
    name = "max_position_embeddings"
    said = getattr(stating(model.config, name), name, None)
    tables = None if _reads_both(model) else position_limit(model)  # images have a table of their own
    limit = tables or (said if isinstance(said, int) else None)
    return limit if limit and limit > 0 else None  # XLNet says -1
