"""The page that says what the term costs and what can be traded, from benchmarks/results/frontier.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Table = Callable[[list[dict[str, Any]], dict[str, str]], str]

_ROWS = {
    "setting": "variant", "step": "ratio_median:.2fx", "peak memory": "peak_ratio:.2fx", "noise": "noise:.2f",
    "angle of the mean": "angle_of_mean:.0f",
}  # fmt: skip
# The settings that the page shows; the file has all.
_SHOWN = (
    "exact", "max_pairs, 1/7 of all", "max_pairs, 1/2 of all", "every=2", "every=4", "max_pairs, 1/7 of all, every=4",
    "observed, max_pairs, 1/7 of all", "observed, max_pairs, 1/14 of all", "observed, max_pairs, 1/7 of all, every=4",
    "stop_gradient='weak'", "encoder: last block", "kronecker, k=8", "kronecker, k=32", "exact, of another batch",
)  # fmt: skip

MODEL = "wrn-28-2"


def cost_page(result: dict[str, Any], default: float, made: str, table: Table) -> str:
    """The page.

    Args:
        result: of frontier.py.
        default: ratio of a step with the term in its default settings, of step_cost.py.
        made: how the result was made.
        table: rows and columns to Markdown.

    Returns:
        Markdown.
    """
    used = result["setting"]
    found = {row["variant"]: row for row in result["rows"] if row["model"] == MODEL}
    settings = table([found[variant] for variant in _SHOWN], _ROWS)
    ranks = {row["dim"]: row for row in result["ranks"] if row["model"] == MODEL}
    return f"""# What it costs, and what can be traded

The exact term on all pairs makes the split FixMatch step of WRN-28-2 {default:.1f} times as long
([measured](../evidence.md#cost)): one forward of both views, a backward to the layer outputs, the inner products, and a
second backward through all of that. Everything below spends less by giving something up:

| setting | what it gives up | unbiased? |
| --- | --- | --- |
| `max_pairs=n` | a random subset of the pairs, rescaled | yes |
| `GGCRWrapper(every=k)` | the term on all steps but every k-th, times k | yes, over steps |
| `stop_gradient="weak"` | that view's gradient is a constant | no: half of the derivative is gone |
| `encoder=...` | fewer parameters are compared | no: it is another cosine |
| `projection=RandomProjection(k)` | sketches are compared, not gradients | products yes, cosine no |

**Take `max_pairs` first, then `every`**: they have no bias, and their noise averages out over steps. Compare fewer
layers where the question is about those layers. A projection keeps every pair and every layer, with noise and a bias;
look at its row before you take it.

One setting gives nothing up: `GGCRWrapper(share="auto")`, the default, takes the unlabeled loss of FixMatch, FlexMatch,
FreeMatch (`fairness_weight=0`), SoftMatch and UDA from the term's own pass, which computes the strong views' losses
anyway. That spares the method's forward and backward of the strong views wherever the step stays the same to rounding:
[what it needs](wrap-your-method.md#one-pass-for-both-losses). A loop without the wrapper calls `gc.with_losses(...)`.

## Measured on {MODEL}

{settings}

"step", "peak memory": over the step without the term. "noise": root mean square of what a setting adds to the gradient,
over that of the gradient; the last row is the noise that the choice of a batch makes anyway. "angle of the mean":
degrees between the exact term's gradient and the setting's, each averaged over {used["rounds"]} batches; noise averages
out, a bias stays. `observed` is the wrapper with `batchnorm="observed"`. {used["labeled"]} labeled inputs and
{used["pairs"]} pairs; random weights and inputs, so pairs may agree less in real training.

![The frontier](../assets/frontier.png)

{made} That file has {len(result["rows"])} rows, of a vision transformer too. {result.get("note", "")}

## Random projections

```python
import torch
from torch import nn

from gradconsist import GradientConsistencyLoss, RandomProjection, diagnostics

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(4),
    nn.Flatten(),
    nn.Linear(512, 10),
)
weak = torch.randn(8, 3, 16, 16)
strong = weak + 0.5 * torch.randn_like(weak)
target = model(weak).argmax(1)

projection = RandomProjection(8, "kronecker", seed=0, resample_every=1)
gc = GradientConsistencyLoss(model, projection=projection)
gc(weak, strong, target).backward()

gc = GradientConsistencyLoss(model, projection=projection)
print(diagnostics.check(gc, weak, strong, target))
```

```text
inner products unbiased by RandomProjection(dim=8, kind='kronecker', seed=0, ...), by GhostEngine(form='auto')
  parameter  in      entries  compared by
  0.weight   Conv2d      432  convolution, factors projected
  0.bias     Conv2d       16  bias, gradient form
  2.weight   Conv2d    4,608  convolution, factors projected
  2.bias     Conv2d       32  bias, gradient form
  6.weight   Linear    5,120  linear, factors projected
  6.bias     Linear       10  bias, gradient form
```

The Kronecker kind projects what a layer saw and the gradient of what it returned to k channels each, and takes the
product of the two: the per-sample gradient never exists. Weights with no more than k rows or columns stay exact, and so
do biases and scales of norms. Both views meet the same matrices, which follow from the seed alone, in every engine,
chunk and process. `resample_every=1` draws new ones for every call; the count of calls is part of `gc.state_dict()`.
`"gaussian"` multiplies the formed gradient by one dense matrix, which costs more than the exact term: it is the
reference for studies.

Squared norms and inner products are right on average, and their variance falls like 1/k. The cosine errs less, because
numerator and denominator err together, and has a bias of order 1/k. On {MODEL}, the root mean square error of a squared
norm and of a cosine is {ranks[4]["norm_error"]:.2f} and {ranks[4]["cosine_error"]:.3f} at k = 4,
{ranks[32]["norm_error"]:.2f} and {ranks[32]["cosine_error"]:.3f} at k = 32 ({used["samples"]} pairs, {used["draws"]}
draws).
"""
