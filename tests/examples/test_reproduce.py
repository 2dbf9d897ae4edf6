from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

import reproduce as program
import trainer.gridrun
from trainer.claims import CIFAR10, CIFAR100, CLAIMS, IMAGENET
from trainer.cli import parse_config
from trainer.config import resolve
from trainer.grid import BUDGETS, VARIANTS, build_grid, papers_protocol
from trainer.gridrun import Times, listing
from trainer.models import build_model
from trainer.statistics import paired_difference, spread
from trainer.tables import markdown, measure, text
from trainer.training import main as train

Reproduce = Callable[..., int]
FAKE = Path(__file__).parents[1] / "support" / "fake_trainer.py"


@pytest.fixture
def reproduce(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Reproduce:
    """The program with the fake trainer, on three cells of two seeds each: `reproduce("--seeds", "2")`."""
    monkeypatch.setattr(trainer.gridrun, "TRAINER", FAKE)
    return lambda *arguments, table=("curves",): program.main(
        ["--table", *table, "--budget", "smoke", "--output", str(tmp_path / "grid"), *arguments]
    )


def tables(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "grid" / "tables.json").read_text())


def calls(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "grid" / "journal.jsonl").read_text().splitlines()]


def test_spread_and_difference_by_hand() -> None:
    numbers = spread([1.0, 2.0, 6.0])
    assert (numbers.n, numbers.mean, numbers.sd) == (3, 3.0, pytest.approx(7**0.5))
    assert spread([4.0]).sd is None
    # Differences 1, 2, 3 of seeds 0, 1, 2; seed 7 has no partner. t(2) at 95 % is 4.303 in any table.
    found = paired_difference({0: 5.0, 1: 6.0, 2: 8.0, 7: 99.0}, {2: 5.0, 1: 4.0, 0: 4.0})
    assert found is not None
    assert (found.n, found.mean) == (3, 2.0)
    assert found.low == pytest.approx(2 - 4.303 / 3**0.5, abs=1e-3)
    assert found.contains(0.0) is True
    assert found.contains(5.0) is False


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    draws = np.random.default_rng(3)
    first, second = draws.normal(0.9, 0.02, 7), draws.normal(0.88, 0.03, 7)
    found = paired_difference(dict(enumerate(first)), dict(enumerate(second)))
    expected = scipy.stats.ttest_rel(first, second).confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_a_single_pair_has_no_interval() -> None:
    found = paired_difference({3: 0.9}, {3: 0.8})
    assert found is not None
    assert (found.n, found.low, found.contains(0.1)) == (1, None, None)
    assert paired_difference({3: 0.9}, {4: 0.8}) is None


def test_the_claims_are_those_of_the_paper(paper_source: str) -> None:
    for claim in CLAIMS.values():
        assert bool(claim.label) == bool(claim.accuracy or claim.text)  # ours claim nothing
        assert not claim.label or f"\\label{{{claim.label}}}" in paper_source
    plain = re.sub(r"\\textbf\{([\d.]+)\}", r"\1", paper_source)

    def numbers(label: str, row: str) -> list[float]:
        table = plain[plain.index(f"label{{{label}}}") :]
        line = re.search(rf"^{re.escape(row)}\s*&(.*?)\\\\", table, re.M)
        assert line is not None, row
        return [float(value) for value in line[1].split("&")]

    for name in ("main", "ablation"):
        claim = CLAIMS[name]
        for row in claim.rows:
            assert numbers(claim.label, row) == [claim.accuracy[row, column] for column in claim.columns]
    claim = CLAIMS["lambda"]
    assert numbers(claim.label, "Accuracy") == [claim.accuracy[row, CIFAR10] for row in claim.rows]
    assert numbers(claim.label, "$\\lambda$") == [float(row) for row in claim.rows]
    assert CLAIMS["curves"].text.split(" and ")[0] in " ".join(paper_source.split())


def test_tables_with_numbers_by_hand(reproduce: Reproduce, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(table=("lambda", "curves", "main")) == 0
    result = tables(tmp_path)
    assert {"column": CIFAR10, "variant": "fixmatch", "seed": 1, "seconds": None, "steps": [4, 8, 12],
            "accuracies": [40.5, 81.0, 81.0]} in result["runs"]  # fmt: skip
    row = next(row for row in result["tables"]["lambda"]["rows"] if row["row"] == "0.5")
    # 0.80 + 0.05 and 0.86 of two seeds; 0.04 above lambda 0.1, whose claim is 0.3 points above that of 0.5.
    assert row["measured"] == pytest.approx({"n": 2, "mean": 85.5, "sd": 0.5**0.5})
    assert row["deviation"] == pytest.approx(85.5 - 92.9)
    assert row["difference"] == pytest.approx({"n": 2, "mean": 4.0, "low": 4.0, "high": 4.0})
    assert (row["claimed_difference"], row["interval_holds_claim"]) == (-0.3, False)
    rows = {row["row"]: row for row in result["tables"]["curves"]["rows"]}
    # Every curve is half as high at step 4 as from step 8 on; FixMatch's end, 0.8 + seed / 100, is the common level.
    assert [value for _, value in rows["FixMatch"]["at"]] == [None, *(pytest.approx(v) for v in (40.25, 80.5, 80.5))]
    assert rows["FixMatch"]["over_run"]["mean"] == pytest.approx((40.25 + 80.5 + 80.5) / 3)
    assert rows["GGCR (ours)"]["difference"]["mean"] == pytest.approx(1.0 * 2.5 / 3)
    assert rows["GGCR (ours)"]["steps_to_level"]["mean"] == 8
    printed = capsys.readouterr().out
    assert "This is not the paper's protocol: dataset digits (paper: cifar10)" in " ".join(printed.split())
    assert "ImageNet (1%) is not run: " in printed
    assert re.search(
        r"^0\.5 +92\.9 +85\.5 ± 0\.7 \(2\) +-7\.4 +\+4\.0 \[\+4\.0, \+4\.0\] \(2\) +-0\.3 +no$", printed, re.M
    )
    shown = (tmp_path / "grid" / "tables.md").read_text()
    assert shown == markdown(result)
    assert "| 0.5 | 92.9 | 85.5 ± 0.7 (2) | -7.4 | +4.0 [+4.0, +4.0] (2) | -0.3 | no |" in shown
    assert (tmp_path / "grid" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_finished_cells_are_not_run_again(reproduce: Reproduce, tmp_path: Path) -> None:
    assert reproduce("--seeds", "1") == 0
    assert len(calls(tmp_path)) == 3
    assert reproduce("--seeds", "2") == 0
    assert [call["cell"] for call in calls(tmp_path)[3:]] == [
        f"digits-20-{variant}-seed1" for variant in ("fixmatch", "flexmatch", "ggcr")
    ]


def test_a_cell_that_crashes_does_not_end_the_grid(
    reproduce: Reproduce, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "grid" / "cells").mkdir(parents=True)
    order = tmp_path / "grid" / "cells" / "digits-20-flexmatch-seed0.do"
    order.write_text("crash")
    assert reproduce("--seeds", "1") == 1
    shown = capsys.readouterr()
    assert "failed with status 7" in shown.err
    assert "a very special failure" in shown.err
    assert "failed: digits-20-flexmatch-seed0" in shown.err
    measured = {row["row"]: row["over_run"] for row in tables(tmp_path)["tables"]["curves"]["rows"]}
    assert measured["FlexMatch"] is None
    assert measured["GGCR (ours)"]["n"] == 1
    order.unlink()
    assert reproduce("--seeds", "1") == 0
    assert [call["status"] for call in calls(tmp_path)] == [0, 7, 0, 0]


def test_ctrl_c_stops_one_cell_with_one_signal_and_the_grid_continues_later(
    reproduce: Reproduce, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = tmp_path / "grid" / "cells" / "digits-20-flexmatch-seed0"
    cell.parent.mkdir(parents=True)
    order = cell.with_name(f"{cell.name}.do")
    order.write_text("wait")

    def interrupt() -> None:
        limit = time.monotonic() + 60
        while not (cell / "waiting").exists() and time.monotonic() < limit:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert reproduce("--seeds", "1") == 130
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
    # 130 is what the fake trainer ends with after a SIGINT of its own; a kill would be -9.
    assert [call["status"] for call in calls(tmp_path)] == [0, 130]
    assert "stopped by SIGINT; start the same command again to continue." in capsys.readouterr().err
    order.unlink()
    assert reproduce("--seeds", "1") == 0
    assert tables(tmp_path)["finished"] == 3


def test_time_for_the_grid_is_time_for_its_cell(reproduce: Reproduce, tmp_path: Path) -> None:
    assert reproduce("--seeds", "1", "--stop-after-minutes", "5") == 0
    options = json.loads((tmp_path / "grid/cells/digits-20-ggcr-seed0/arguments.json").read_text())
    assert 4 < float(options["--stop-after-minutes"]) <= 5
    assert reproduce("--seeds", "2", "--stop-after-minutes", "1e-9") == 0
    assert len(calls(tmp_path)) == 3


def test_no_folder_holds_two_protocols(
    reproduce: Reproduce, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce("--seeds", "1") == 0
    assert reproduce("--seeds", "1", "--", "--workers", "0") == 0  # changes no number
    assert reproduce("--seeds", "1", "--", "--batch-size", "8") == 1
    assert "CIFAR-10 (40), --batch-size: 4 there, 8 now" in capsys.readouterr().err
    assert reproduce("--budget", "demo") == 1
    assert "--budget: smoke there, demo now" in capsys.readouterr().err
    (tmp_path / "grid" / "grid.json").write_text("{")
    assert reproduce() == 1
    assert "grid.json cannot be read" in capsys.readouterr().err
    assert len(calls(tmp_path)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds must be above 0; found 0"),
        (["--stop-after-minutes", "-1"], "--stop-after-minutes must be above 0; found -1.0"),
        (["--", "--ggcr-weight", "0.3"], "--ggcr-weight is set by the grid for each run: leave it out"),
        (["--", "--output=elsewhere"], "--output is set by the grid"),
    ],
)
def test_refused_options(
    reproduce: Reproduce, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert reproduce(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "grid").exists()


def test_the_list_has_states_and_times(
    reproduce: Reproduce, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce("--list") == 0
    assert "6 cells, 0 finished; about 2 s left (a first guess" in capsys.readouterr().out
    assert not (tmp_path / "grid").exists()
    grid = build_grid(tmp_path / "grid", "smoke", ["curves"], 2, [])
    grid.claim_grid()
    # 12 steps took fixmatch 24 s instead of 12 * 0.02 s: 100 times the guess, so ggcr is expected to take 60 s.
    Times(grid).add(grid.cells[0], 24.0, 12, 0)
    times = Times(grid)
    assert [times.left(cell) for cell in grid.cells[:3]] == pytest.approx([24.0, 24.0, 12 * 0.05 * 100])
    times.add(grid.cells[2], 6.0, 6, 0)
    assert times.left(grid.cells[5]) == pytest.approx(12.0)
    assert "about 2 min left (by the cells that ran here)" in listing(grid)


def test_tables_share_their_runs() -> None:
    grid = build_grid(Path("runs"), "paper", list(CLAIMS), None, [])
    assert {cell.variant for cell in grid.cells} == set(VARIANTS)
    assert len({cell.folder for cell in grid.cells}) == len(grid.cells) == 5 * (len(VARIANTS) + 3)
    assert [cell.config.seed for cell in grid.cells] == sorted(cell.config.seed for cell in grid.cells)


def test_the_paper_budget_is_the_papers_protocol() -> None:
    grid = build_grid(Path("runs"), "paper", ["main"], 1, [])
    for column in (CIFAR10, CIFAR100):
        paper, own = papers_protocol(column), grid.protocol()[column]
        assert {name: value for name, value in own.items() if paper[name] != value} == {}
        assert (own["arch"], own["steps"], own["batch_size"]) == ("wrn-28-2", 2**20, 64)
        assert (own["ggcr_weight"], own["ggcr_warmup"], own["unlabeled_ramp"]) == (0.1, 1000, 5000)
    assert grid.protocol()[CIFAR100]["labels"] == 400


def test_a_data_set_of_ones_own_stands_for_one_column() -> None:
    grid = build_grid(Path("runs"), "small", ["main"], 1, ["--dataset", "folder", "--data-dir", "photos"])
    assert {(cell.column, cell.config.dataset) for cell in grid.cells} == {(CIFAR10, "folder")}
    assert set(grid.absent) == {CIFAR100, IMAGENET}


@pytest.mark.parametrize("budget", BUDGETS)
def test_cells_are_what_their_command_lines_say(budget: str, tmp_path: Path) -> None:
    grid = build_grid(tmp_path, budget, list(CLAIMS), 1, ["--device", "cpu"])
    for cell in grid.cells[:: 1 if budget == "smoke" else 8]:  # a command line takes long to parse
        assert resolve(parse_config(cell.arguments, program="fixmatch_cifar.py", description="")) == cell.config
    by_variant = {cell.variant: cell.config for cell in grid.cells}
    assert by_variant["fixmatch"].ggcr_weight == by_variant["flexmatch"].ggcr_weight == 0
    assert by_variant["ggcr-no-warmup"].ggcr_warmup == 0
    assert by_variant["gradient-norm"].ggcr_criterion == "gradient-norm"
    assert [by_variant[f"ggcr-{weight}"].ggcr_weight for weight in (0.01, 0.05, 0.5, 1.0)] == [0.01, 0.05, 0.5, 1.0]
    assert by_variant["fixmatch-longer"].steps == round(BUDGETS[budget].longer * by_variant["fixmatch"].steps)
    assert by_variant["ggcr-1.0-no-warmup"].ggcr_warmup == 0
    assert by_variant["ggcr-weak-constant"].ggcr_stop_gradient == "weak"
    plain = dataclasses.replace(by_variant["ggcr"], output=None)
    same = [name for name, config in by_variant.items() if dataclasses.replace(config, output=None) == plain]
    assert same == ["ggcr"]  # no variant forgot what it changes


@pytest.mark.parametrize(("arch", "parameter"), [("wrn-10-1", "encoder.3.conv1.weight"), ("wrn-28-2", "encoder.12.")])
def test_the_last_block_is_that_of_the_network(arch: str, parameter: str) -> None:
    grid = build_grid(Path("runs"), "small", ["settings"], 1, ["--arch", arch])
    prefix = next(cell.config.ggcr_encoder for cell in grid.cells if cell.variant == "ggcr-last-block")
    names = [name for name, _ in build_model(arch, 10, momentum=0.1).named_parameters()]
    assert parameter.startswith(prefix)
    blocks = [name.split(".")[1] for name in names if name.startswith("encoder.") and "conv1" in name]
    assert prefix == f"encoder.{blocks[-1]}."


def test_tables_of_ours_have_no_claims(
    reproduce: Reproduce, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce(table=("time",)) == 0
    row = tables(tmp_path)["tables"]["time"]["rows"][-1]
    assert (row["claim"], row["claimed_difference"], row["interval_holds_claim"]) == (None, None, None)
    assert row["difference"] == pytest.approx({"n": 2, "mean": 1.0, "low": 1.0, "high": 1.0})
    printed = capsys.readouterr().out
    assert "time: Equal time (not in the paper)" in printed
    assert re.search(r"^GGCR \(ours\) +81\.5 ± 0\.7 \(2\) +\+1\.0 \[\+1\.0, \+1\.0\] \(2\)$", printed, re.M)


def test_real_cells_become_tables(tmp_path: Path) -> None:
    grid = build_grid(tmp_path, "smoke", ["curves"], 1, ["--workers", "0", "--progress", "none"])
    for cell in grid.cells:
        assert train(parse_config(cell.arguments, program="fixmatch_cifar.py", description="")) == 0
        assert cell.is_finished()
        assert cell.steps_done() == 12
    result = measure(grid, "last")
    assert result["finished"] == 3
    assert all(row["over_run"]["n"] == 1 for row in result["tables"]["curves"]["rows"])
    assert re.search(r"^GGCR \(ours\) +- +[\d.]+ ", text(result), re.M)
