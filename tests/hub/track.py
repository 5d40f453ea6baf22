"""A short training that reports to trackio, in a process of its own: `python track.py FOLDER`."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from pathlib import Path


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    os.environ["TRACKIO_DIR"] = str(folder / "trackio")
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

    from tests.hub.test_neighbours import trainer_of

    trainer_of(folder / "out", report_to=["trackio"], project="reductions", run_name="small").train()
    (store,) = (folder / "trackio").glob("reductions*.db")
    with sqlite3.connect(store) as database:
        lines = [json.loads(row[0]) for row in database.execute("select metrics from metrics order by step")]
    losses = [line["train/loss/kl"] for line in lines if "train/loss/kl" in line]
    print("\n" + json.dumps({"kl": losses, "stages": sum("train/rmtkd/stage" in line for line in lines)}))
