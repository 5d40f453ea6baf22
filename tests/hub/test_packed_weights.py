"""What cannot be cut is refused by its files alone."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from optimum_rmtkd import RMTKDError
from optimum_rmtkd.hub.loading import check_plain, load_config


@pytest.mark.parametrize(
    "quantization, cure",
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "dequantize\\(\\) and save it"),
        ({"quant_method": "mxfp4"}, "Mxfp4Config\\(dequantize=True\\) and save it"),
        ({"quant_method": "gptq", "bits": 4}, "take the checkpoint that they were made from. Quantise"),
    ],
)
def test_quantised_weights_say_how_to_get_plain_ones(tmp_path, quantization, cure):
    config = LlamaConfig(hidden_size=16, num_attention_heads=2)
    check_plain("plain", config)
    config.quantization_config = quantization
    with pytest.raises(RMTKDError, match=f"quantised \\({quantization['quant_method']}\\).*{cure}"):
        check_plain("packed", config)


@pytest.mark.parametrize("named", ["folder", "file"])
def test_gguf_files_say_how_to_get_plain_ones(tmp_path, named):
    (tmp_path / "tiny-q4_k_m.gguf").write_bytes(b"GGUF")
    with pytest.raises(RMTKDError, match="packed weights \\(GGUF\\).*gguf_file='tiny-q4_k_m.gguf'"):
        load_config(tmp_path if named == "folder" else tmp_path / "tiny-q4_k_m.gguf")
