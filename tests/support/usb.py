"""The real ``semilearn`` without a GPU: its import, an algorithm of it on small images, and its training loop's steps.

semilearn 0.3.2 imports libraries for text, audio and experiment trackers, and moves everything by ``.cuda()``.  Neither
is what is tested: what is not installed of the former is put in as an empty stand-in, and where there is no GPU the
latter stays where it is.  No code of semilearn is replaced.
"""

from __future__ import annotations

import importlib.util
import io
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import cache
from types import ModuleType
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn

ALGORITHMS = (
    "fixmatch", "flexmatch", "freematch", "softmatch", "uda", "meanteacher", "pimodel", "mixmatch", "pseudolabel",
)  # fmt: skip
#: What semilearn imports and image algorithms never use.
_UNUSED = {
    "aim": [],
    "wandb": [],
    "torchaudio": [],
    "transformers": ["file_utils", "tokenization_utils_base", "data"],
    "timm": ["models", "models.layers"],
    "skimage": ["util"],
}


class _Nothing(ModuleType):
    """A module whose every name is an empty class."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@cache
def semilearn() -> ModuleType:
    """The package; raises ImportError where it is not installed."""
    if importlib.util.find_spec("semilearn") is None:
        raise ImportError("semilearn is not installed: make test-usb does it")
    for root, parts in _UNUSED.items():
        if importlib.util.find_spec(root) is None:
            for name in (root, *(f"{root}.{part}" for part in parts)):
                sys.modules[name] = _Nothing(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("semilearn")


class _Event:
    """In place of torch.cuda.Event in semilearn's timer."""

    def __init__(self, **_: Any) -> None: ...

    def record(self) -> None: ...

    def elapsed_time(self, _: Any) -> float:
        return 0.0


@contextmanager
def without_gpu() -> Iterator[None]:
    """Where there is no GPU, ``.cuda()`` leaves tensors and modules in place and CUDA's clock stands still."""
    with ExitStack() as stack:
        if not torch.cuda.is_available():
            for owner, name, new in (
                (Tensor, "cuda", lambda self, *_, **__: self),
                (nn.Module, "cuda", lambda self, *_, **__: self),
                (torch.cuda, "Event", _Event),
                (torch.cuda, "synchronize", lambda *_: None),
                (torch.cuda, "set_device", lambda *_: None),
            ):
                stack.enter_context(mock.patch.object(owner, name, new))
        yield


def small_network(num_classes: int, **_: Any) -> nn.Module:
    """semilearn's own wide residual network, at depth 10."""
    from semilearn.nets.wrn.wrn import WideResNet

    return WideResNet(first_stride=1, num_classes=num_classes, depth=10, widen_factor=1)


def build(name: str, *, network: Any = small_network, seed: int = 0, **config: Any) -> Any:
    """An algorithm without a data set, its model on the GPU if there is one, as its ``train()`` would start it."""
    package = semilearn()
    options = {
        "algorithm": name, "dataset": "none", "num_classes": 10, "num_train_iter": 20, "num_eval_iter": 10**6,
        "num_log_iter": 10**6, "batch_size": 4, "uratio": 2, "gpu": 0, "distributed": False, "world_size": 1, "rank": 0,
        "ulb_dest_len": 64, "lb_dest_len": 8, "p_cutoff": 0.1, "unsup_warm_up": 0.4, "lr": 0.03,
    } | config  # fmt: skip
    torch.manual_seed(seed)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # it prints what it does
        warnings.simplefilter("ignore")  # torch.cuda.amp's names are old, and there is no CUDA
        algorithm = package.get_algorithm(package.get_config(options), network, None, None)
    algorithm.model.cuda(0) if torch.cuda.is_available() else None
    algorithm.epoch = 0
    algorithm.model.train()
    with without_gpu():
        algorithm.call_hook("before_run")
    return algorithm


def batch_of(step: int, *, labeled: int = 4, unlabeled: int = 8) -> dict[str, Tensor]:
    """Random images: the batch that semilearn's loaders give, with both views."""
    draws = torch.Generator().manual_seed(step)
    weak = torch.randn(unlabeled, 3, 8, 8, generator=draws)
    return {
        "idx_lb": torch.arange(labeled),
        "x_lb": torch.randn(labeled, 3, 8, 8, generator=draws),
        "y_lb": torch.randint(10, (labeled,), generator=draws),
        "idx_ulb": torch.randint(64, (unlabeled,), generator=draws),
        "x_ulb_w": weak,
        "x_ulb_s": weak + 0.5 * torch.randn(unlabeled, 3, 8, 8, generator=draws),
    }


def step(algorithm: Any, batch: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """One turn of the loop of ``AlgorithmBase.train``."""
    with without_gpu(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        algorithm.call_hook("before_train_step")
        algorithm.out_dict, algorithm.log_dict = algorithm.train_step(**algorithm.process_batch(**batch))
        algorithm.call_hook("after_train_step")
    algorithm.it += 1
    return algorithm.out_dict, algorithm.log_dict
