"""A plain checkpoint stays plain: it loads in a process that has none of this package, with the same outputs."""

from __future__ import annotations

import json
import subprocess
import sys

from safetensors.torch import save_file

from optimum_rmtkd import trim_vocabulary

from .conftest import DOMAIN, tiny
from .test_trimming import PAIRS, encode, outputs


LOAD = """
import sys
sys.modules["optimum_rmtkd"] = None
import torch, transformers
from pathlib import Path
from safetensors.torch import load_file
for folder in sorted(Path(sys.argv[1]).iterdir()):
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    model, found = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    saved = load_file(folder / "expected" / "tensors.safetensors")
    texts = (folder / "expected" / "texts.txt").read_text(encoding="utf8").split("\\n")
    inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    assert torch.equal(inputs["input_ids"], saved["input_ids"]), folder
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    # Another process sums in another order: threads, and where in memory the weights of a mapped file begin.
    torch.testing.assert_close(logits, saved["logits"], rtol=0, atol=1e-5, msg=lambda text: f"{folder}: {text}")
    print(folder.name)
assert not any(name.startswith("optimum_rmtkd.") for name in sys.modules)
"""


def test_plain_checkpoints_load_with_transformers_alone(tokenizers, tmp_path):
    for kind, family in PAIRS:
        tokenizer = tokenizers(kind)
        small, cut, _ = trim_vocabulary(tiny(family, tokenizer), tokenizer, DOMAIN)
        folder = tmp_path / "models" / f"{kind}-{family}"
        small.save_pretrained(folder)
        cut.save_pretrained(folder)
        (folder / "expected").mkdir()
        (folder / "expected" / "texts.txt").write_text("\n".join(DOMAIN[:4]), encoding="utf8")
        inputs = encode(cut, DOMAIN[:4])
        save_file(
            {"input_ids": inputs["input_ids"], "logits": outputs(small, inputs).contiguous()},
            folder / "expected" / "tensors.safetensors",
        )
        config = json.loads((folder / "config.json").read_text())
        assert "auto_map" not in config and "rmtkd" not in config and not list(folder.glob("*.py"))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "models"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == len(PAIRS)
