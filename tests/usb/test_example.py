"""The program of the guide runs, with semilearn's own loaders, `train()`, evaluation and checkpoints."""

from __future__ import annotations

import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch

from support import usb

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "usb_fixmatch.py"


@pytest.mark.parametrize("algorithm", ["fixmatch", "pseudolabel"])
def test_the_program_of_the_guide(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), "--algorithm", algorithm, "--steps", "4"])
    with usb.without_gpu(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SystemExit, match=r"^0$"):
            runpy.run_path(str(PROGRAM), run_name="__main__")
    printed = capsys.readouterr().out
    assert "4 steps, with the term from step 1 on" in printed
    assert "test accuracy of the averaged model: 0." in printed
    saved = torch.load(tmp_path / "saved_models" / "fixmatch" / "latest_model.pth", weights_only=True)
    assert saved["gradconsist"]["step"] == 4
