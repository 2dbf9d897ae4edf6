"""Stands for fixmatch_cifar.py where a test is about the grid: the same command line and folder, no torch.

Accuracy in the end: 0.80 for fixmatch, 0.81 for flexmatch, 0.80 + weight / 10 with the term, and 0.01 * seed on top.
What a file beside it named `CELL.do` says: `crash`, or `wait` for a SIGINT.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

words = sys.argv[1:]
options = dict(zip(words[::2], words[1::2], strict=True))
folder = Path(options["--output"])
folder.mkdir(parents=True, exist_ok=True)
order = folder.parent / f"{folder.name}.do"
what = order.read_text() if order.exists() else ""
(folder / "arguments.json").write_text(json.dumps(options))
seed, weight = int(options["--seed"]), float(options["--ggcr-weight"])
accuracy = 0.80 + 0.01 * (options["--method"] == "flexmatch") + weight / 10 + 0.01 * seed
record = {"label": "fake", "options": {"seed": seed, "dataset": "digits", "variant": folder.name}}
(folder / "config.json").write_text(json.dumps(record))
with open(folder / "metrics.jsonl", "w") as file:
    file.write(json.dumps({"kind": "eval", "step": 4, "test_accuracy": accuracy / 2}) + "\n")
if what == "crash":
    print("a very special failure")
    sys.exit(7)
if what == "wait":
    stopped: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: stopped.append(number))
    (folder / "waiting").touch()
    while not stopped:
        time.sleep(0.01)
    sys.exit(130)
with open(folder / "metrics.jsonl", "a") as file:
    for step, height in ((8, accuracy), (12, accuracy)):
        file.write(json.dumps({"kind": "eval", "step": step, "test_accuracy": height}) + "\n")
(folder / "summary.json").write_text(json.dumps({"last": accuracy, "median_last_20": accuracy, "best": accuracy}))
