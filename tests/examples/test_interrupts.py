"""A Ctrl-C ends a program soon, on one line: before the first step, while files are checked, beside a dead disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from support.pictures import MakeFolder

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "examples"), str(ROOT / "src")])}
TRAIN = """
import dataclasses, sys, time
from pathlib import Path
from trainer.config import preset_config
from trainer.training import main
{before}
config = dataclasses.replace(preset_config("demo"), dataset="folder", data_dir=sys.argv[1], output=sys.argv[2],
    feed="stream", strong="weak", labels="all", image_size=8, batch_size=2, workers=1, steps=4000, device="cpu")
sys.exit(main(config))
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and last line, of a process that ends."""
    try:
        said = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    return process.returncode, said.splitlines()[-1]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.05)


def test_an_interrupt_that_a_library_swallows_is_remembered(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import os, signal\nfrom trainer.models import WideResNet\n"
        "def network(classes):\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGINT)\n    except:\n        pass\n"
        "    return WideResNet(10, 1, classes)\n"
    )
    command = [sys.executable, str(ROOT / "examples" / "fixmatch_cifar.py"), "--preset", "demo", "--workers", "0"]
    command += ["--arch", "own:network", "--output", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert ended(process) == (130, "interrupted; what is in the output folder is whole.")


def test_an_interrupt_does_not_wait_for_all_files_to_be_read(photo_folder: MakeFolder, tmp_path: Path) -> None:
    root = photo_folder(train={"ant": 400, "bee": 400})
    slow = (
        "import trainer.datasets\nread = trainer.datasets.read_image\n"
        "trainer.datasets.read_image = lambda path: "
        "(time.sleep(0.2), Path(sys.argv[3], path.parent.name + path.name).touch(), read(path))[2]"
    )
    (tmp_path / "reading").mkdir()
    process = start(TRAIN.format(before=slow), root, tmp_path / "run", tmp_path / "reading")
    wait_for(tmp_path / "reading" / "ant000.png", process)
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "interrupted; what is in the output folder is whole.")
    assert len(list((tmp_path / "reading").iterdir())) < 600  # 16 for each of up to 32 threads are under way


def test_a_worker_that_never_answers_does_not_keep_the_program(photo_folder: MakeFolder, tmp_path: Path) -> None:
    root = photo_folder(train={"ant": 4, "bee": 4})
    dead = (
        "import trainer.datasets\n"
        "trainer.datasets.Photographs.read = lambda self, k: (Path(sys.argv[3]).touch(), time.sleep(1000))"
    )
    process = start(TRAIN.format(before=dead), root, tmp_path / "run", tmp_path / "reading")
    wait_for(tmp_path / "reading", process)
    for _ in range(2):  # the first one waits for the step
        process.send_signal(signal.SIGINT)
        time.sleep(1)
    assert ended(process) == (130, "interrupted; what is in the output folder is whole.")
