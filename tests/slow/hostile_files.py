"""Files that are damaged, foreign or forged: is each answered by name, and nothing believed, run or lost? Linux.

    python tests/slow/hostile_files.py                    # all parts
    python tests/slow/hostile_files.py --only flipped     # some parts, beside other processes; other results are kept
    python tests/slow/hostile_files.py --quick            # a few cases of each, nothing written

    truncated   a checkpoint cut at every 4 KiB and at each of its first and last 64 bytes, its record at every byte:
                the one before is loaded
    flipped     2,000 random bits of a checkpoint, every bit of its record, and random bits of config.json, split.json
                and metrics.jsonl: refused, or the one before is loaded, or nothing that trains has changed
    full        the disk is full from the n-th file operation on, for every n of a whole run; and no file may grow
                beyond a limit: one line of error, no temporary file left, and the resumed run is the uninterrupted one
    places      folders that cannot be written, files that cannot be read, links to nowhere, pipes, a slow disk, signals
                during every write
    mismatch    checkpoints and run directories of another model, method, split, format or data set
    pickles     forged checkpoints (tests/support/forgeries.py): refused in under a second (the two that unpack apart),
                with less than 200 MB more memory, and nothing is run
    archives    forged archives and batches in the place of CIFAR-10's: nothing is unpacked or written
    data        images and folders that are damaged
    fuzz        hypothesis on the readers of records, run files and states: errors by name only
    not finite  NaN and infinity in parameters, gradients and the term: nothing is updated

The exit status is 1 if a case is answered in another way.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/shared"))
from environment import write_result
from hostile_checkpoints import flipped, fuzz, pickles, truncated
from hostile_data import archives, data
from hostile_runs import full, mismatch, not_finite, places
from victims import ROOT

RESULT = ROOT / "benchmarks" / "results" / "hostile_files.json"

# A part yields (row, case, answer): "ok: ..." is right.
Part = Callable[[Path, bool], Iterator[tuple[str, str, str]]]
PARTS: dict[str, Part] = {
    "truncated": truncated, "flipped": flipped, "pickles": pickles, "archives": archives, "data": data, "fuzz": fuzz,
    "mismatch": mismatch, "not finite": not_finite, "places": places, "full": full,
}  # fmt: skip


def table(part: str, quick: bool) -> list[dict[str, Any]]:
    """The rows of a part: cases, those answered as they should be, and the answers by kind."""
    rows: dict[str, dict[str, Any]] = {}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name, case, answer in PARTS[part](Path(folder), quick):
            row = rows.setdefault(name, {"part": part, "row": name, "cases": 0, "right": 0, "answers": {}, "wrong": []})
            row["cases"] += 1
            row["right"] += answer.startswith("ok: ")
            row["answers"] = dict(Counter(row["answers"]) + Counter([answer.removeprefix("ok: ")]))
            if not answer.startswith("ok: "):
                row["wrong"].append(f"{case}: {answer}")
                print(f"WRONG  {part}, {name}, {case}: {answer}", flush=True)
    for row in rows.values():
        print(f"{part:<11}{row['row']:<60}{row['right']:>6} / {row['cases']}  {json.dumps(row['answers'])}", flush=True)
    print(f"{part}: {time.monotonic() - begun:.0f} s", flush=True)
    return list(rows.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="a few cases of each part; nothing is written")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    failed = False
    for part in options.only:
        try:
            rows = table(part, options.quick)
        except Exception:
            traceback.print_exc()
            rows = [{"part": part, "row": "the program itself", "cases": 1, "right": 0, "answers": {}, "wrong": []}]
        failed |= any(row["right"] != row["cases"] for row in rows)
        if not options.quick:  # read only now: another process may run other parts
            before = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
            rows += [row for row in before if row["part"] != part]
            order = list(PARTS)
            write_result(options.output, {"rows": sorted(rows, key=lambda row: order.index(row["part"]))})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
