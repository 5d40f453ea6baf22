"""What is measured of a small model beside its accuracy: work, bytes, time, whether it comes back from a folder."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from optimum_rmtkd.models.timing import compare_latency

from .common import inputs_of


LENGTH = 128
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
# A stranger's process: no import of this package. First without, then with the code that lies in the folder.
RELOAD = """
import sys, warnings, torch
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging
logging.set_verbosity_error()
warnings.simplefilter("ignore")
folder = sys.argv[1]
seen = torch.load(f"{folder}/seen.pt", weights_only=True)
verdict = None
for trusted in (False, True):
    try:
        model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=trusted).eval()
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        verdict = verdict or type(error).__name__
        continue
    with torch.no_grad():
        same = torch.allclose(model(**seen["inputs"]).logits.float(), seen["logits"], atol=2e-3)
    verdict = ("yes, with the code in the folder" if trusted else "yes") if same else "silently other answers"
    break
print("verdict:", verdict)
"""


def flops(model: PreTrainedModel) -> float:
    """Of one text of 128 tokens, 2 a multiply-add, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**_texts(1))
    return float(counter.get_total_flops())


def latencies(dense: PreTrainedModel, small: PreTrainedModel, repeats: dict[int, int]) -> dict[str, float]:
    """Dense over small, median of interleaved blocks in one process, by the size of the batch."""
    return {
        str(batch): compare_latency(dense, small, _texts(batch), repeats=count).ratio
        for batch, count in repeats.items()
    }


def _texts(batch: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 500, (batch, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def saved(model: PreTrainedModel, tokenizer: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Bytes of the weights that `save_pretrained` writes, and what `from_pretrained` makes of the folder in a fresh
    process."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
        except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
            return {"bytes": None, "loads": f"not saved: {type(error).__name__}"}
        tokenizer.save_pretrained(folder)
        size = sum(file.stat().st_size for kind in WEIGHTS for file in Path(folder).glob(kind))
        inputs = inputs_of(batch)
        with torch.no_grad():
            torch.save({"inputs": inputs, "logits": model(**inputs).logits.float()}, f"{folder}/seen.pt")
        done = subprocess.run([sys.executable, "-c", RELOAD, folder], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("verdict: ")]
    said = lines[0].removeprefix("verdict: ") if lines else f"no: {done.stderr.strip().splitlines()[-1][:60]}"
    return {"bytes": size, "loads": said if said.startswith(("yes", "silently", "no")) else f"no: {said}"}
