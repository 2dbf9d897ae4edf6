from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import report
from support.run_folders import write_run
from support.runs import MakeConfig
from trainer.errors import DatasetError
from trainer.page import number, page, svg, ticks
from trainer.panels import Panel, Series, panels, thinned
from trainer.runs import group_runs, read_run
from trainer.training import run

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Reader(HTMLParser):
    """Elements, attributes and text of a page; every element must be closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.cells: list[list[str]] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in {"td", "th"}:
            self.cells[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in {"td", "th"}:
            self.cells[-1][-1] += data

    def row(self, first: str) -> list[str]:
        return next(row for row in self.cells if row and row[0] == first)


def read_page(*folders: Path, title: str = "Runs") -> Reader:
    return Reader(page(group_runs([read_run(folder) for folder in folders]), title=title))


@pytest.fixture
def two_methods(tmp_path: Path) -> list[Path]:
    """FixMatch and GGCR, two seeds each, the last run unfinished, with logs of everything."""
    folders = []
    for label, lift in (("fixmatch", 0.0), ("fixmatch+ggcr", 0.1)):
        for seed in (0, 1):
            training = [
                {"step": step, "mask_rate": step / 40, "confident_accuracy": 0.9, "pseudo_label_accuracy": 0.8}
                for step in (10, 20)
            ]
            if lift:
                term = {"ggcr_pairs": 8.0, "ggcr_degenerate": 2.0, "ggcr_cosine": 0.4}
                for line in training:
                    line |= term | {
                        "ggcr_cosine_q10": -0.2,
                        "ggcr_cosine_q50": 0.5 + 0.1 * seed,
                        "ggcr_cosine_q90": 0.9,
                    }
            folders.append(
                write_run(
                    tmp_path / f"{label}-{seed}", label=label, seed=seed, training=training,
                    accuracies=(0.4, 0.5 + lift + 0.02 * seed), timing=((10, 5.0), (20, 8.0)),
                    finished=(label, seed) != ("fixmatch+ggcr", 1),
                )
            )  # fmt: skip
    return folders


def test_numbers_of_the_page_by_hand(two_methods: list[Path]) -> None:
    shown = read_page(*two_methods)
    # Accuracies 0.50 and 0.52; 8 s for 20 steps of 80 images.
    assert shown.row("fixmatch")[:4] == ["fixmatch", "0, 1", "0.5100 ± 0.0141 (2)", "0.4550 ± 0.0071 (2)"]
    assert shown.row("fixmatch")[5:7] == ["0.400 ± 0.000 (2)", "200.0 ± 0.0 (2)"]
    assert shown.row("fixmatch+ggcr")[1:3] == ["0", "0.6000 (1)"]
    difference = [row for row in shown.cells if row[0] == "fixmatch+ggcr"][1]
    assert difference[1] == "+0.1000 (1)"
    assert "1 unfinished" in shown.text
    assert [row[-1] for row in shown.cells if row[0].endswith(("ggcr-0", "ggcr-1"))] == ["finished", "unfinished"]


def test_pairs_need_the_same_split(two_methods: list[Path]) -> None:
    (two_methods[0] / "split.json").write_text('{"sha256": "another"}')
    assert [row for row in read_page(*two_methods).cells if row[0] == "fixmatch+ggcr"][1][1] == "no pair"


def test_differences_of_protocol_and_environment_are_listed(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", ggcr_weight=0.1, arch="wrn-10-1")
    second = write_run(tmp_path / "b", ggcr_weight=0.5, arch="wrn-10-1")
    config = json.loads((second / "config.json").read_text())
    config["software"] = {"revision": "abc1234"}
    (second / "config.json").write_text(json.dumps(config))
    shown = read_page(first, second)
    names = ["fixmatch, ggcr_weight 0.1", "fixmatch, ggcr_weight 0.5"]
    assert shown.row("option") == ["option", *names]
    assert shown.row("ggcr_weight") == ["ggcr_weight", "0.1", "0.5"]
    assert [row for row in shown.cells if row[0] == "arch"] == [["arch", "wrn-10-1", "wrn-10-1"]]  # of all options
    assert shown.row("torch 2.0, device cpu, revision abc1234")[1] == "b"


def test_the_page_needs_nothing_from_elsewhere(two_methods: list[Path]) -> None:
    shown = read_page(*two_methods)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "img"} & set(shown.tags)
    fetched = {"src", "href", "srcset", "data", "action", "poster", "xlink:href", "background"}
    assert [entry for entry in shown.attributes if entry[1] in fetched or entry[1].startswith("on")] == []
    source = page(group_runs([read_run(folder) for folder in two_methods]), title="Runs")
    assert not re.search(r"url\(|@import|https?:", source)
    assert "default-src 'none'" in source
    assert "prefers-color-scheme: dark" in source
    assert ("meta", "content", "width=device-width, initial-scale=1") in shown.attributes


def test_names_are_text_wherever_they_are_shown(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"
    training = [{"step": 5, "mask_rate": 1}]
    folders = [
        write_run(tmp_path / "<b>bold", label=attack, note=attack, training=training),
        write_run(tmp_path / "other", label=attack, note="x", timing=((5, 1.0),)),
    ]
    shown = read_page(*folders, title=attack)
    assert not {"script", "img", "b"} & set(shown.tags)
    assert [entry for entry in shown.attributes if entry[1] in {"src", "onerror"}] == []
    assert shown.text.count(attack) > 5
    assert "<b>bold" in shown.text


def test_bands_are_over_seeds_and_pairs(two_methods: list[Path]) -> None:
    drawn = {panel.key: panel for panel in panels(group_runs([read_run(folder) for folder in two_methods]))}
    plain, term = drawn["accuracy"].series
    assert (plain.name, plain.colour, term.colour) == ("fixmatch", 0, 1)
    assert plain.steps == [10, 20]
    assert plain.middle == pytest.approx([0.4, 0.51])
    assert plain.band is not None
    assert plain.band[0] == pytest.approx([0.4, 0.5])
    assert plain.band[1] == pytest.approx([0.4, 0.52])
    (cosine,) = drawn["gc"].series
    assert cosine.colour == 1
    assert cosine.middle == pytest.approx([0.55, 0.55])
    assert cosine.band == ([-0.2, -0.2], [0.9, 0.9])
    assert drawn["degenerate"].series[0].middle == [0.25, 0.25]
    assert drawn["seconds"].series[0].middle == pytest.approx([0.5, 0.3])
    assert set(drawn) == {"accuracy", "gc", "degenerate", "mask", "confident", "pseudo", "seconds"}


def test_seconds_per_step_survive_a_resume(tmp_path: Path) -> None:
    """Steps 11 to 20 ran twice: the first time does not count."""
    folder = write_run(tmp_path / "run", timing=((10, 10.0), (20, 20.0), (15, 11.0), (25, 13.0)))
    assert read_run(folder).timing == [(10, 10.0), (15, 11.0), (25, 13.0)]
    seconds = next(panel for panel in panels(group_runs([read_run(folder)])) if panel.key == "seconds")
    assert seconds.series[0].middle == pytest.approx([1.0, 0.2, 0.2])


def test_an_unfinished_run_ends_where_its_lines_end(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", accuracies=(0.3, 0.6, 0.5), finished=False)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "eval", "step": 40, "test_accu')
    read = read_run(folder)
    assert read.steps == [10, 20, 30]
    assert read.accuracy() == {"last": 0.5, "median_last_20": 0.5, "best": 0.6}
    (folder / "metrics.jsonl").write_text("")
    assert read_run(folder).accuracy() == {}
    assert "unfinished" in read_page(folder).text


def test_folders_that_are_no_runs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert report.main([str(run), str(tmp_path / "empty"), "--output", str(tmp_path / "out.html")]) == 1
    assert f"{tmp_path / 'empty'} is not the directory of a run" in capsys.readouterr().err
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.jsonl", '{"kind": "eval", "step": "<i>", "test_accuracy": 0.5}\n'),
        ("metrics.jsonl", '{"kind": "eval", "step": 1, "test_accuracy": NaN}\n'),
        ("metrics.jsonl", '{"kind": "train", "step": 1, "loss": Infinity}\n'),
        ("metrics.jsonl", '{"kind": "eval", "step": 1e999, "test_accuracy": 1}\n'),
        ("metrics.jsonl", '{"kind": "eval", "step": -5, "test_accuracy": 1}\n'),
        ("metrics.jsonl", "[" * 100_000 + "\n"),
        ("metrics.jsonl", "[1]\n"),
        ("metrics.jsonl", "\xff\n"),
        ("timing.jsonl", '{"step": 1, "seconds": null}\n'),
        ("timing.jsonl", '{"step": 0, "seconds": 0, "images_per_second": 0}\n'),
        ("summary.json", '{"last": 0.5}'),
        ("summary.json", '{"last": 1e999, "median_last_20": 1, "best": 1}'),
        ("summary.json", '{"last": "high", "median_last_20": 0.5, "best": 0.5}'),
        ("split.json", "[]"),
        ("config.json", '{"label": "x", "options": {"seed": "y"}}'),
        ("config.json", '{"label": "x", "options": null}'),
    ],
)
def test_damaged_files_are_no_run(tmp_path: Path, file: str, content: str) -> None:
    run = write_run(tmp_path / "run")
    (run / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(DatasetError, match="run is not the directory of a run"):
        read_run(run)


def test_numbers_of_the_log_that_are_none_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", training=[{"step": 5, "x": None, "y": "<b>"}, {"step": 10, "x": 2}])
    assert read_run(run).curve("x") == {10: 2.0}
    assert read_run(run).curve("y") == {}


def test_a_run_counts_once(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    with pytest.raises(DatasetError, match=r"one and .*two are one run twice: the same options and seed 0"):
        group_runs([read_run(one), read_run(two)])


def test_groups_are_named_by_what_differs_and_never_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four options differ, and the fourth alone tells the first two apart; weights and data have names, no hashes."""
    common: dict[str, Any] = {"dataset": "folder", "a": 1, "b": 1, "c": 1, "d": 0.1, "init_sha256": "0" * 64}
    folders = [
        write_run(tmp_path / "one", **common, data_dir="here/photos", init_from="w/first.pt"),
        write_run(tmp_path / "two", **common | {"d": 0.1 + 1e-9}, data_dir="here/photos", init_from="w/first.pt"),
        write_run(tmp_path / "three", **common | {"a": 2, "b": 2, "c": 2}, data_dir="photos", init_from="w/first.pt"),
        write_run(tmp_path / "four", **common | {"init_sha256": "1" * 64}, data_dir="photos", init_from="w/next.pt"),
        write_run(tmp_path / "five", **common, data_dir="there/photos", init_from="w/first.pt"),
    ]
    for folder, data in zip(folders, "aaaab", strict=True):
        (folder / "split.json").write_text(json.dumps({"sha256": "abc", "data_sha256": data * 64}))
    names = [group.name for group in group_runs([read_run(folder) for folder in folders])]
    assert len(set(names)) == 5
    assert not any(digits in name for name in names for digits in ("0" * 8, "1" * 8, "a" * 8))
    assert names[0] == "fixmatch, data here/photos, a 1, d 0.1, init_from first.pt, 2 more"
    assert "d 0.100000001" in names[1]
    assert "init_from next.pt" in names[3]
    assert "data there/photos" in names[4]
    assert report.main([*map(str, folders), "--output", str(tmp_path / "page.html")]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["run", "what", "data", "seed"]
    for folder, name, row in zip(folders, names, rows, strict=False):
        assert row.startswith(str(folder))
        assert row.split(name)[1].split()[:3] == ["photos", "0", "20/20"]


def test_what_changes_no_number_separates_no_group(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"{seed}", seed=seed, workers=seed, output=f"runs/{seed}") for seed in (3, 1)]
    (group,) = group_runs([read_run(folder) for folder in folders])
    assert [run.seed for run in group.runs] == [1, 3]


def test_pictures(two_methods: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(folder) for folder in two_methods]
    assert report.main([*runs, "--output", str(tmp_path / "out" / "curves.png")]) == 0
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert report.main([*runs, "--output", str(tmp_path / "page.html"), "--png"]) == 0
    keys = {path.stem.removeprefix("page-") for path in tmp_path.glob("page-*.png")}
    assert keys == {"accuracy", "gc", "degenerate", "mask", "confident", "pseudo", "seconds"}
    assert report.main([*runs, "--output", str(tmp_path / "page.pdf")]) == 2
    assert "page.pdf: the name must end in .html (the page) or .png (the curves)" in capsys.readouterr().err
    assert report.main([*runs, "--output", str(tmp_path / "page.png"), "--png"]) == 2
    assert "give a name in .html" in capsys.readouterr().err


def test_a_dollar_is_no_formula(tmp_path: Path) -> None:
    folders = [str(write_run(tmp_path / f"{n}", label="$\\frac$", cost=f"$_{n}")) for n in (0, 1)]
    output = tmp_path / "curves.png"
    assert report.main([*folders, "--output", str(output), "--title", "$\\nonsense$"]) == 0
    assert report.main([*folders, "--output", str(tmp_path / "page.html"), "--png"]) == 0


def test_points_lie_where_the_axes_say() -> None:
    panel = Panel("k", "t", "w", (Series("s", 0, [0, 100], [0.0, 2.0], ([0.0, 0.5], [0.0, 2.0])),), 0.0)
    drawn = svg(panel)
    found = re.search(r'class="line c0" d="M([\d.]+),([\d.]+)L([\d.]+),([\d.]+)"', drawn)
    assert found is not None
    left, bottom, right, top = map(float, found.groups())
    marks = {
        text: (float(x), float(y)) for x, y, text in re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)<', drawn)
    }
    assert marks["100"][0] == right
    assert left < right
    assert marks["2"][1] == top
    assert top < bottom
    assert marks["1"][1] - marks["0.5"][1] == pytest.approx((top - bottom) / 4, abs=0.11)


def test_ticks_are_round_and_cover() -> None:
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(0.31, 0.97) == [0.2, 0.4, 0.6, 0.8, 1.0]
    for low, high in ((0.5, 0.5), (0.0, 0.0), (-3e-9, 7e5), (1e-7, 2e-7), (0, 2**20), (0.123, 0.1234)):
        marks = ticks(low, high)
        rounding = 1e-6 * (marks[1] - marks[0])
        assert marks[0] - rounding <= low <= high <= marks[-1] + rounding
        assert 2 <= len(marks) <= 9
    assert [number(value) for value in (0.25, 2000, 20_000, 1_048_576, 0)] == ["0.25", "2000", "20k", "1.04858M", "0"]


def test_long_runs_are_thinned_and_keep_their_end() -> None:
    kept = thinned(list(range(1, 16385)))
    assert len(kept) <= 240
    assert kept[-1] == 16384
    assert thinned([1, 2]) == [1, 2]
    assert thinned([]) == []


def test_the_trainer_logs_how_gc_is_spread(tiny_at: MakeConfig, tmp_path: Path) -> None:
    config = tiny_at(tmp_path / "run", ggcr_max_pairs=None, ggcr_every=1)
    assert run(config) == 0
    read = read_run(tmp_path / "run")
    low, middle, high = (read.curve(f"ggcr_cosine_{key}") for key in ("q10", "q50", "q90"))
    assert low
    assert all(-1 <= low[step] <= middle[step] <= high[step] <= 1 for step in low)
    assert any(low[step] < high[step] for step in low)
    assert {"revision", "torch", "gradconsist"} <= set(read.environment)
    assert {"gc", "accuracy", "seconds"} <= {panel.key for panel in panels(group_runs([read]))}


# A frame has the colour scheme of the element that it is in.
PROBE = """
<title></title>
<iframe id="phone light" src="page.html" width="390" height="3000" style="color-scheme: light"></iframe>
<iframe id="phone dark" src="page.html" width="390" height="3000" style="color-scheme: dark"></iframe>
<iframe id="desk light" src="page.html" width="1280" height="3000" style="color-scheme: light"></iframe>
<iframe id="desk dark" src="page.html" width="1280" height="3000" style="color-scheme: dark"></iframe>
<script>
function look(frame) {
  const page = frame.contentDocument, left = box => Math.round(box.getBoundingClientRect().left);
  const lines = [...page.querySelectorAll("figure .line")].map(line => line.getBoundingClientRect());
  const style = page.defaultView.getComputedStyle(page.body);
  return {
    needed: page.documentElement.scrollWidth, figures: page.querySelectorAll("figure").length,
    drawn: lines.filter(box => box.width > 50).length,
    letters: page.querySelector("figure svg text").getBoundingClientRect().height,
    colours: [style.backgroundColor, style.color], columns: new Set([...page.querySelectorAll("figure")].map(left)).size
  };
}
window.onload = () => {
  const seen = [...document.querySelectorAll("iframe")].map(frame => [frame.id, look(frame)]);
  document.title = JSON.stringify(Object.fromEntries(seen));
};
</script>
"""


def look_at(folder: Path) -> dict[str, Any]:
    """What a browser makes of `page.html` in the windows of a phone and of a desk, light and dark."""
    (folder / "probe.html").write_text(PROBE)
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--allow-file-access-from-files", "--virtual-time-budget=3000", f"--user-data-dir={folder / 'profile'}",
        "--dump-dom", (folder / "probe.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    found = re.search(r"<title>(.*?)</title>", done.stdout)
    assert found is not None, done.stdout[-500:]
    seen: dict[str, Any] = json.loads(found[1])
    return seen


@pytest.mark.skipif(BROWSER is None, reason="no chromium on the path")
def test_a_browser_shows_the_page(two_methods: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "look"
    folder.mkdir()
    long = [
        write_run(tmp_path / f"a-{'very' * 20}-long-name-{n}", label="a" * 60, ggcr_weight=n, note="word" * 30)
        for n in (1, 2)
    ]
    groups = group_runs([read_run(path) for path in (*long, *two_methods)])
    (folder / "page.html").write_text(page(groups, title="x" * 80))
    seen = look_at(folder)
    for shown in seen.values():
        assert shown["figures"] == 7
        assert shown["drawn"] >= 12
    for scheme in ("light", "dark"):
        assert seen[f"phone {scheme}"]["needed"] <= 390  # nothing but tables scrolls sideways
        assert seen[f"phone {scheme}"]["letters"] >= 9
        assert seen[f"phone {scheme}"]["columns"] == 1
        assert seen[f"desk {scheme}"]["columns"] > 1
    assert seen["desk light"]["colours"] == ["rgb(255, 255, 255)", "rgb(26, 28, 32)"]
    assert seen["desk dark"]["colours"] == ["rgb(21, 23, 26)", "rgb(230, 232, 235)"]
