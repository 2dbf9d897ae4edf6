"""The third zoo: whole models, of torchvision and timm, the trainers' network and small language models.

Sizes that a CPU takes in seconds: some are stock, some of the same classes with fewer and narrower blocks. A row whose
name begins with a package's name needs that package; `installed` says whether it is there.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .oracle import Tape
from .zoo import Case, normal

PAIRS = 2
IMAGE = normal(3, 32, 32)
CLASSES = 5


def needs(name: str) -> str | None:
    """The package that a row is made of."""
    return name.split("/")[0] if "/" in name else None


@functools.cache
def installed(package: str) -> str | None:
    """Why a package cannot be used; None if it can."""
    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError) as error:  # torchvision beside another torch's build raises a RuntimeError
        return f"{type(error).__name__}: {error}"
    return None


# -- what the oracle's copy needs by hand ------------------------------------------------------------------------------


def _by_hand(model: nn.Module, tape: Tape) -> None:
    """Stochastic depth off; timm's norm with activation by its two parts, its standardised kernels by their formula."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind == "StochasticDepth":
            module.p = 0.0
        elif kind == "DropPath":
            module.drop_prob = 0.0
        elif kind in ("Hardsigmoid", "HardSigmoid"):  # torch has no second derivative for the fused form
            module.forward = lambda x: (x / 6 + 0.5).clamp(0, 1)
        elif kind == "BatchNormAct2d":
            act = lambda x, name=name, m=module: m.act(m.drop(tape.normalize(name, m, x)))  # noqa: E731
            module.forward = act
        elif kind == "StdConv2d":
            module.forward = lambda x, m=module: m._conv_forward(x, _standardized(m.weight, m.eps), m.bias)
        elif kind == "ScaledStdConv2d":
            scale = lambda m: m.gain.view(-1, 1, 1, 1) * m.scale  # noqa: E731
            module.forward = lambda x, m=module, scale=scale: m._conv_forward(
                x, scale(m) * _standardized(m.weight, m.eps), m.bias
            )


def _standardized(weight: Tensor, eps: float) -> Tensor:
    """Each kernel with mean 0 and variance 1, a function of the parameter."""
    centered = weight - weight.mean((1, 2, 3), keepdim=True)
    return centered / (centered.square().mean((1, 2, 3), keepdim=True) + eps).sqrt()


def _stir(model: nn.Module) -> None:
    """Off the initial values, which switch residual branches off (layer scales of 1e-6, norms of gain 0)."""
    generator = torch.Generator().manual_seed(3)
    noise = lambda x: torch.randn(x.shape, generator=generator).to(x.dtype)  # noqa: E731
    with torch.no_grad():
        for parameter in model.parameters():
            size = float(parameter.square().mean().sqrt())
            parameter.add_(noise(parameter) * (0.2 * size if size > 1e-3 else 0.2))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.1 * noise(buffer))
            if name.endswith("running_var"):
                buffer.mul_(1.0 + 0.3 * noise(buffer).abs())


def _seasoned(model: nn.Module) -> None:
    """As after training: running statistics of real inputs. With others a deep model does not see its input."""
    _stir(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(IMAGE(torch.Generator().manual_seed(5)))
    model.eval()


def _case(name: str, build: Callable[[], nn.Module], **options: Any) -> Case:
    options = {"inputs": IMAGE, "classes": CLASSES, "randomize": False, "prepare": _stir, **options}
    return Case(name, build, reference=_by_hand, **options)


def _made(path: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    """What "module:name" makes, imported only then."""
    module, name = path.split(":")
    return lambda: getattr(importlib.import_module(module), name)(*args, **options)


# -- torchvision and timm ----------------------------------------------------------------------------------------------


def _torchvision(name: str, **options: Any) -> nn.Module:
    from torchvision import models

    return models.get_model(name, weights=None, num_classes=CLASSES, **options)


def _torchvision_resnet(**options: Any) -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, groups=4, width_per_group=8, **options)


def _torchvision_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    blocks = [CNBlockConfig(16, 24, 1), CNBlockConfig(24, 32, 2), CNBlockConfig(32, None, 1)]
    return ConvNeXt(blocks, stochastic_depth_prob=0.2, num_classes=CLASSES)


def _torchvision_swin(version: int) -> nn.Module:
    from torchvision.models import swin_transformer as swin

    second = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if version == 2 else {}
    return swin.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], 2.0, num_classes=CLASSES, **second)


def _torchvision_efficientnet() -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

    blocks = [
        FusedMBConvConfig(2, 3, 1, 16, 8, 1), MBConvConfig(4, 3, 2, 8, 12, 2), MBConvConfig(6, 5, 2, 12, 16, 2)
    ]  # fmt: skip
    return EfficientNet(blocks, dropout=0.2, num_classes=CLASSES)


def _torchvision_regnet() -> nn.Module:
    from torchvision.models.regnet import BlockParams, RegNet

    params = BlockParams.from_init_params(depth=5, w_0=16, w_a=8.0, w_m=2.0, group_width=8, se_ratio=0.25)
    return RegNet(params, num_classes=CLASSES, stem_width=16)


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)
        return model

    return build


def _timm_resnet_v2() -> nn.Module:
    from timm.layers import GroupNormAct, StdConv2d
    from timm.models.resnetv2 import ResNetV2

    norm = functools.partial(GroupNormAct, group_size=4)
    small = {"channels": (16, 32), "stem_chs": 8, "stem_type": "fixed"}
    return ResNetV2([1, 1], num_classes=CLASSES, conv_layer=StdConv2d, norm_layer=norm, **small)


def _timm_nfnet() -> nn.Module:
    from timm.models.nfnet import NfCfg, NormFreeNet

    cfg = NfCfg(
        (1, 1), (16, 32), stem_type="3x3", stem_chs=8, group_size=8, act_layer="gelu", attn_layer="se", attn_kwargs={}
    )
    return NormFreeNet(cfg, num_classes=CLASSES, drop_path_rate=0.1)


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
_SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}


# -- ours, and text ----------------------------------------------------------------------------------------------------


def _wrn(arch: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        examples = str(Path(__file__).resolve().parents[2] / "examples")
        if examples not in sys.path:
            sys.path.insert(0, examples)
        from trainer.models import build_model

        return build_model(arch, CLASSES, momentum=0.1)

    return build


class LanguageModel(nn.Module):
    """Tokens to logits of the next token, [B, T, V] or [B, V] of the last real one: causal, padded, tied head."""

    def __init__(self, *, last: bool, vocabulary: int = 19, features: int = 16, length: int = 8) -> None:
        super().__init__()
        self.last = last
        self.tokens, self.positions = nn.Embedding(vocabulary, features, 0), nn.Embedding(length, features)
        layer = nn.TransformerEncoderLayer(features, 2, 32, 0.1, "gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(features), nn.Linear(features, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        length = input_ids.shape[1]
        x = self.tokens(input_ids) + self.positions(torch.arange(length, device=input_ids.device))
        causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).triu(1)
        x = self.norm(self.body(x, mask=causal, src_key_padding_mask=~attention_mask))
        if self.last:
            at = attention_mask.long().sum(1).sub(1)
            return {"logits": self.head(x.gather(1, at.view(-1, 1, 1).expand(-1, 1, x.shape[2])).squeeze(1))}
        return {"logits": self.head(x), "ids": input_ids, "mask": attention_mask}


def sequence_loss(output: dict[str, Tensor], target: Tensor) -> Tensor:
    """Mean cross-entropy of each sequence's own next tokens, and of `target` after its first one."""
    log_p = torch.log_softmax(output["logits"].float() if output["logits"].dtype.itemsize < 4 else output["logits"], 2)
    ids = torch.cat([target[:, None], output["ids"][:, 2:]], 1)
    keep = output["mask"][:, 1:].to(log_p.dtype)
    own = log_p[:, :-1].gather(2, ids[:, :, None]).squeeze(2)
    return -(own * keep).sum(1) / keep.sum(1).clamp_min(1.0)


def _text(g: torch.Generator) -> dict[str, Tensor]:
    lengths = torch.randint(2, 9, (16,), generator=g)
    mask = torch.arange(8) < lengths[:, None]
    return {"input_ids": torch.randint(1, 19, (16, 8), generator=g) * mask, "attention_mask": mask}


_TEXT: dict[str, Any] = {"inputs": _text, "classes": 19}

_TABLE = [
    _case("wrn-10-1", _wrn("wrn-10-1")),
    _case("wrn-28-2", _wrn("wrn-28-2"), inputs=normal(3, 16, 16)),
    _case("language_model", lambda: LanguageModel(last=True), **_TEXT),
    _case("language_model_sequence", lambda: LanguageModel(last=False), loss_fn=sequence_loss, **_TEXT),
    _case("language_model_eval", lambda: LanguageModel(last=True), training=False, **_TEXT),
    _case("torchvision/resnet18", lambda: _torchvision("resnet18")),
    _case("torchvision/resnext_bottleneck", _torchvision_resnet),
    _case(
        "torchvision/resnet_groupnorm", lambda: _torchvision_resnet(norm_layer=functools.partial(nn.GroupNorm, 4))
    ),
    _case("torchvision/convnext", _torchvision_convnext),
    _case("torchvision/vit", _made("torchvision.models.vision_transformer:VisionTransformer", 32, 8, 2, 2, 32, 64,
          dropout=0.1, attention_dropout=0.1, num_classes=CLASSES)),
    _case("torchvision/swin", lambda: _torchvision_swin(1)),
    _case("torchvision/swin_v2", lambda: _torchvision_swin(2)),
    _case("torchvision/efficientnet", _torchvision_efficientnet),
    _case("torchvision/mobilenet_v2", lambda: _torchvision("mobilenet_v2", width_mult=0.25)),
    _case("torchvision/mobilenet_v2_eval", lambda: _torchvision("mobilenet_v2", width_mult=0.25), training=False,
          prepare=_seasoned),
    _case("torchvision/mobilenet_v3_small", lambda: _torchvision("mobilenet_v3_small")),
    _case("torchvision/regnet", _torchvision_regnet),
    _case("torchvision/shufflenet_v2", lambda: _torchvision("shufflenet_v2_x0_5")),
    _case("torchvision/squeezenet", lambda: _torchvision("squeezenet1_1")),
    _case("torchvision/densenet", _made("torchvision.models.densenet:DenseNet", 8, (2, 2), 16, bn_size=2, drop_rate=0.1,
          num_classes=CLASSES)),
    _case("timm/resnet10t", _timm("resnet10t")),
    _case("timm/resnetv2_weight_standardised", _timm_resnet_v2),
    _case("timm/nfnet_weight_standardised", _timm_nfnet),
    _case("timm/vit_tiny", _timm("vit_tiny_patch16_224", drop_path_rate=0.1, **_VIT)),
    _case("timm/vit_gap_qknorm", _timm("vit_tiny_patch16_224", class_token=False, global_pool="avg", qk_norm=True,
                                       init_values=1e-5, **_VIT)),
    _case("timm/convnext_atto", _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(16, 24, 32, 40),
                                      drop_path_rate=0.1)),
    _case("timm/convnextv2_atto", _timm("convnextv2_atto", depths=(1, 1, 1, 1), dims=(16, 24, 32, 40))),
    _case("timm/swin", _timm("swin_tiny_patch4_window7_224", **_SWIN)),
    _case("timm/efficientnet_lite", _made("timm.models.efficientnet:_gen_efficientnet_lite", "efficientnet_lite0", 0.25,
          0.5, num_classes=CLASSES)),
    _case("timm/mobilenetv3_small_050", _timm("mobilenetv3_small_050", drop_rate=0.1)),
    _case("timm/mixer", _made("timm.models.mlp_mixer:MlpMixer", CLASSES, 32, patch_size=8, num_blocks=2, embed_dim=32)),
]  # fmt: skip

WHOLE_CASES: dict[str, Case] = {case.name: case for case in _TABLE}
