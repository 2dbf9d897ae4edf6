"""Torchvision's classifiers with random weights, and the normalisation that was asked for."""

from __future__ import annotations

import math

from torch import nn

from trainer.errors import OptionError
from trainer.imagenet.config import ImageNetConfig
from trainer.methods import classifier_head
from trainer.models import with_group_norm
from trainer.processes import Processes

GROUPS = 32  # of GroupNorm, as in its paper; fewer where the channels cannot be divided by it


def build_network(config: ImageNetConfig, classes: int, processes: Processes) -> nn.Module:
    """Build the network that `--arch` names; initialised from torch's global generator.

    Args:
        config: Resolved options.
        classes: Number of classes K.
        processes: Whose SyncBatchNorm.

    Returns:
        The network on the CPU, in train mode, with torchvision's parameter names.

    Raises:
        OptionError: There is no such classifier, or its normalisation cannot be the one asked for.
    """
    from torchvision import models

    if config.arch not in models.list_models(module=models):
        near = [name for name in models.list_models(module=models) if name.startswith(config.arch[:3])]
        raise OptionError(
            f"--arch {config.arch!r} is no classifier of torchvision.models: write for example "
            f"{', '.join(near[:6]) or 'resnet18, resnet50'}."
        )
    model = models.get_model(config.arch, weights=None, num_classes=classes)
    if classifier_head(model)[1].out_features != classes:
        raise OptionError(f"--arch {config.arch}: its last linear layer is not the classifier; try resnet50.")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if config.norm != "batch" and not norms:
        raise OptionError(f"--norm {config.norm}: {config.arch} has no BatchNorm to replace; leave it out.")
    for norm in norms:
        norm.momentum = config.bn_momentum
    if config.norm == "group":
        with_group_norm(model, lambda channels: math.gcd(GROUPS, channels))
    if config.norm == "sync":
        if processes.world == 1 or processes.device.type != "cuda":
            raise OptionError(
                f"--norm sync needs CUDA and several processes; found {processes.world} on {processes.device.type}: "
                "write --norm batch, or --norm group."
            )
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model
