"""The BatchNorm statistics that a method's own forward used, read while it runs and without changing it."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from gradconsist.errors import ConfigError
from gradconsist.normalization import Statistics, batch_statistics


class StatisticsObserver(TorchFunctionMode):
    """Records each BatchNorm call in batch mode of each forward of `model` inside the block.

    Args:
        model: the model whose forwards are told apart.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._forwards: list[list[Statistics]] = []
        self._inside = 0

    def __enter__(self) -> StatisticsObserver:
        self._hooks = [
            self._model.register_forward_pre_hook(self._begin),
            self._model.register_forward_hook(self._end, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for hook in self._hooks:
            hook.remove()

    def _begin(self, *_: Any) -> None:
        self._forwards.append([])
        self._inside += 1

    def _end(self, *_: Any) -> None:
        self._inside -= 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and self._inside and (args[5] if len(args) > 5 else kwargs.get("training", False)):
            with torch.no_grad():
                self._forwards[-1].append(batch_statistics(args[0] if args else kwargs["input"]))
        return func(*args, **kwargs)

    def statistics(self) -> list[Statistics]:
        """The statistics of the one forward in batch mode.

        Returns:
            One entry for each BatchNorm call in batch mode.

        Raises:
            ConfigError: the method forwarded the model in batch mode never, or more than once.
        """
        found = [forward for forward in self._forwards if forward]
        if len(found) != 1:
            raise ConfigError(
                f"`batchnorm='observed'` needs one forward in train mode per step, the method did {len(found)}: use"
                " `batchnorm='auto'`, or a method that forwards all its inputs at once (FixMatch(joint=True))."
            )
        return found[0]
