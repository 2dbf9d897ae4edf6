"""Fifteen minutes on a GPU: what the tests on a simulated one cannot show.

    python benchmarks/gpu/measure.py                       # on a GPU; parts that no longer fit are left out
    python benchmarks/gpu/measure.py --only steps models
    python benchmarks/gpu/measure.py --rehearse            # on the simulated GPU, about five minutes

The parts run in the order of their worth, and the result is written after each of them:

cases        tests/gpu/cases on this device: every comparison with the CPU
reads        where the host waits in a step with the term, by torch's own sync debug mode
precision    models of the tests' zoo and a WRN against float64, with TF32 off and on
steps        WRN-28-2: milliseconds of a step without and with the term, and the share of them in which kernels run
models       ResNet-50 and ViT-tiny likewise
memory       a device with too little memory: the chunk that fits, and the same numbers
nccl         one process with NCCL: the same gradients under DistributedDataParallel
training     FixMatch without and with the term on images, with the time that is left
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks/shared", "benchmarks/cost", "tests", "src")]
from environment import write_result
from models import spec
from timed_step import DEVICE, PRECISIONS, Step, allow_tf32, timed

from gradconsist import GradientConsistencyLoss
from support import compare, simulated_gpu
from support.zoo import CASES

Row = dict[str, Any]


def part_cases(small: bool) -> list[Row]:
    files = ["training.py"] if small else ["zoo.py", "training.py", "programs.py"]
    rows = []
    for file in files:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/gpu/cases/{file}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
        lines = done.stdout.splitlines()
        rows.append({"file": file, "said": lines[-1:], "failed": [line for line in lines if line.startswith("FAILED")]})
    return rows


def part_reads(small: bool) -> list[Row]:
    rows = []
    for name in ("wrn-10-1",) if small else ("wrn-28-2", "vit-tiny"):
        step = Step(name, 4, 8, None, 0.1)
        step()
        step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places = Counter(
            f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)
        )
        rows.append({"model": name, "reads": sum(places.values()), "places": dict(places)})
    return rows


def _answer(model: nn.Module, views: Iterable[Tensor], loss_fn: Any) -> tuple[Tensor, Tensor]:
    loss = GradientConsistencyLoss(model, loss_fn=loss_fn)
    gradient = compare.gradient_of(loss(*views), model).cpu()
    assert loss.last is not None
    return loss.last.cosine.double().cpu(), gradient


def part_precision(small: bool) -> list[Row]:
    """Largest error of a cosine, and relative error of the gradient."""
    problems: dict[str, tuple[nn.Module, list[Any], Any]] = {}
    for name in ("mlp", "cnn_batchnorm_train", "vit") if small else CASES:
        case = CASES[name]
        if not case.soft and case.loss_fn is None and name not in ("unregistered_memory", "data_dependent"):
            problem = case.problem()
            problems[name] = problem.model, list(problem.views), None
    for name in ("wrn-10-1",) if small else ("wrn-28-2", "vit-tiny"):
        torch.manual_seed(0)
        weak = torch.randn(8, 3, 32, 32).double()
        views = [weak, weak + 0.3 * torch.randn_like(weak), torch.arange(8) % 10]
        problems[name] = spec(name).build().double(), views, None
    rows = []
    for name, (model, views, loss_fn) in problems.items():
        row: Row = {"model": name}
        try:
            cosine, gradient = _answer(copy.deepcopy(model), views, loss_fn)
            single = copy.deepcopy(model).float().to(DEVICE)
            moved = [compare_view(view) for view in views]
            for precision in ("float32", "tf32"):
                allow_tf32(PRECISIONS[precision][0])
                found = _answer(copy.deepcopy(single), moved, loss_fn)
                row[f"{precision}_cosine"] = compare.cosine_error(found[0], cosine)
                row[f"{precision}_gradient"] = compare.relative(found[1], gradient)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
    allow_tf32(False)
    return rows


def compare_view(view: Any) -> Any:
    """A view in float32 on the device."""
    from support.oracle import tree_map

    return tree_map(lambda x: (x.float() if x.is_floating_point() else x).to(DEVICE), view)


def _timings(name: str, side: int | None, sizes: list[tuple[int, int]], chunks: list[Any], rounds: int) -> list[Row]:
    rows = []
    for labeled, unlabeled in sizes:
        for precision, (tf32, dtype) in PRECISIONS.items():
            allow_tf32(tf32)
            settings: list[tuple[str, float, Any, str]] = [("method", 0.0, "auto", "fixed")]
            settings += [("term", 0.1, chunk, "fixed") for chunk in chunks if chunk == "auto" or chunk <= unlabeled]
            settings += [("term", 0.1, "auto", "varying")]
            for what, weight, chunk, mask in settings:
                step = Step(name, labeled, unlabeled, side, weight, chunk_size=chunk)
                thresholds = (0.0, 0.12, 0.15, 0.2) if mask == "varying" else (0.0,)
                row: Row = {
                    "model": name, "labeled": labeled, "unlabeled": unlabeled, "precision": precision, "step": what,
                    "chunk": chunk, "mask": mask,
                }  # fmt: skip
                try:
                    row |= timed(
                        lambda number, s=step, d=dtype, t=thresholds: s(d, t[number % len(t)]),  # type: ignore[misc]
                        rounds,
                    )
                except torch.OutOfMemoryError:
                    row["failed"] = "out of memory"
                rows.append(row)
                del step
                torch.cuda.empty_cache()
    allow_tf32(False)
    return rows


def part_steps(small: bool) -> list[Row]:
    if small:
        return _timings("cnn", 8, [(2, 4)], ["auto", 2], 1)
    return _timings("wrn-28-2", None, [(8, 56), (64, 448)], ["auto", 56, 112, 224, 448], 8)


def part_models(small: bool) -> list[Row]:
    if small:
        return _timings("mlp", None, [(2, 4)], ["auto"], 1)
    return _timings("resnet-50", 224, [(16, 48)], ["auto"], 5) + _timings("vit-tiny", None, [(64, 448)], ["auto"], 5)


def part_memory(small: bool) -> list[Row]:
    """The device is given less and less; the loss stays the same until a single pair no longer fits."""
    shape = ("wrn-10-1", 2, 8, 16) if small else ("wrn-28-2", 64, 448, None)
    total = torch.cuda.get_device_properties(0).total_memory
    rows = []
    name, labeled, pairs, side = shape
    step = Step(name, labeled, pairs, side, 0.1)
    views = (step.batch.weak, step.batch.strong, torch.zeros(len(step.batch.weak), dtype=torch.long, device=DEVICE))
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    expected = float(step.loss(*views).detach())
    peak = torch.cuda.max_memory_allocated()
    for share in (1.0, 0.7, 0.5, 0.3, 0.2):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, (base + share * (peak - base)) / total))
        row: Row = {"model": shape[0], "share": share, "peak_mib": (peak - base) / 2**20}
        try:
            loss = step.loss.with_options()
            row["error"] = abs(float(loss(*views).detach()) - expected)
        except torch.OutOfMemoryError as error:
            row["failed"] = str(error).partition(".")[0]
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        rows.append(row)
    return rows


def part_nccl(small: bool) -> list[Row]:
    """With one process; the simulated device has gloo alone."""
    backend = "cuda:gloo" if small else "nccl"
    gradients = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            for parallel in (False, True):
                step = Step("wrn-10-1", 4, 8, 16, 0.1)
                wrapper = nn.parallel.DistributedDataParallel(step.wrapper) if parallel else step.wrapper
                wrapper(step.batch).loss.backward()
                gradients.append(torch.cat([p.grad.flatten() for p in step.model.parameters() if p.grad is not None]))
        finally:
            torch.distributed.destroy_process_group()
    return [{"backend": backend, "error": compare.relative(gradients[1], gradients[0])}]


def part_training(small: bool, seconds: float = 60.0, data: Path | None = None) -> list[Row]:
    """Each of the two runs gets half of the time; what it reached then stands in its metrics."""
    folder = data or ROOT / "data" / "cifar10-jpeg"
    options = ["--dataset=folder", f"--data-dir={folder}", "--labels=250", "--steps=20000", "--eval-every=250"]
    if small or not folder.is_dir():
        options = ["--preset=demo", "--steps=20", "--eval-every=10", "--batch-size=4", "--unlabeled-ratio=2"]
    mode = ["-m", "support.simulated_gpu"] if "SIMULATED_GPU" in os.environ else []
    rows = []
    for weight in (0.0, 0.1):
        with tempfile.TemporaryDirectory() as output:
            command = [
                sys.executable,
                *mode,
                "examples/fixmatch_cifar.py",
                *options,
                "--device=cuda",
                "--progress=none",
            ]
            command += [
                f"--ggcr-weight={weight}",
                "--ggcr-warmup=10",
                "--checkpoint-every=250",
                f"--output={output}/run",
            ]
            row: Row = {
                "ggcr_weight": weight,
                "data": "demo" if options[0].startswith("--preset") else str(folder.name),
            }
            try:
                done = subprocess.run(
                    command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds / 2
                )
                row["status"] = done.returncode
                if done.returncode:
                    row["failed"] = (done.stdout + done.stderr)[-600:]
            except subprocess.TimeoutExpired:
                row["status"] = "stopped by the clock"
            metrics = Path(output) / "run" / "metrics.jsonl"
            row["last"] = metrics.read_text().splitlines()[-2:] if metrics.exists() else []
            rows.append(row)
    return rows


PARTS: dict[str, Callable[..., list[Row]]] = {
    "cases": part_cases, "reads": part_reads, "precision": part_precision, "steps": part_steps, "models": part_models,
    "memory": part_memory, "nccl": part_nccl, "training": part_training,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=15.0, help="no part starts later than this")
    parser.add_argument("--data-dir", type=Path, help="images in one folder per class, below train/ and test/")
    parser.add_argument("--rehearse", action="store_true", help="small sizes, to see that every part runs")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.rehearse and "SIMULATED_GPU" not in os.environ:
        command = [sys.executable, "-m", "support.simulated_gpu", *sys.argv]
        return subprocess.run(command, env=os.environ | simulated_gpu.environment(), check=False).returncode
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device: `--rehearse` takes the simulated one")
    results = ROOT / ("build/benchmarks" if options.rehearse else "benchmarks/results")
    output = options.output or results / "gpu.json"
    begun, failed = time.monotonic(), []
    found: dict[str, dict[str, Any]] = {}
    for name in options.only:
        start = time.monotonic()
        left = 60 * options.minutes - (start - begun)
        if left <= 0:
            found[name] = {"left out": "no time left"}
            continue
        extra = {"seconds": max(60.0, left), "data": options.data_dir} if name == "training" else {}
        try:
            rows = PARTS[name](options.rehearse, **extra)
            found[name] = {"rows": rows}
        except Exception as error:  # the next part may still say something
            traceback.print_exc()
            failed.append(name)
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:600]}
        found[name]["seconds"] = round(time.monotonic() - start, 1)
        write_result(output, {"rehearsal": options.rehearse, "parts": found})
        print(f"{name}: {found[name]['seconds']} s, {len(found[name].get('rows', []))} rows", flush=True)
    print(f"written to {output}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
