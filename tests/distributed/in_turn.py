"""Launched by torchrun: several of the scripts beside this one, one after the other in the same processes, which pay
for their start once.

    torchrun ... -m tests.distributed.in_turn JOBS      JOBS: JSON, [[module, folder, option, ...], ...]
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from .leaving import leave


def main():
    for module, folder, *options in json.loads(Path(sys.argv[1]).read_text()):
        accelerator = importlib.import_module(f"{__package__}.{module}").main([folder, *options])
        accelerator.wait_for_everyone()
    leave(accelerator)


if __name__ == "__main__":
    main()
