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
second backward through all of that. What can be given up to spend less:

| setting | what it does | unbiased? |
| --- | --- | --- |
| `max_pairs=n` | a random subset of the pairs, rescaled | yes |
| `GGCRWrapper(every=k)` | the term on every k-th step only, times k | yes, over steps |
| `stop_gradient="weak"` | that view's gradient is a constant | no: half of the derivative is gone |
| `encoder=...` | fewer parameters are compared | no: it is another cosine |
| `projection=RandomProjection(k)` | compares sketches, not gradients | products yes, cosine no |

**Take `max_pairs` first, then `every`**: they have no bias, and their noise averages out over steps. Compare fewer
layers if the question is about those layers. A projection adds noise and a bias and saves little time or none;
`stop_gradient` saves [at most a sixth](../evidence.md#cost) of a step.

`GGCRWrapper(share="auto")`, the default, gives nothing up: FixMatch and its relatives take their unlabeled loss from
the term's own pass, [where that is possible](wrap-your-method.md#one-pass-for-both-losses). It saves up to an eighth
of a step (["one pass"](../evidence.md#cost)). A loop without the wrapper calls `gc.with_losses(...)`.

## Measured on {MODEL}

{settings}

"step", "peak memory": over the step without the term, by the {used["clock"]} clock on
{result["environment"]["threads"]} thread, so "exact" is not the figure above. "noise": root mean square of what a
setting adds to the gradient, over that of the gradient; the last row is the noise between batches. "angle of the
mean": degrees between the exact term's gradient and the setting's, each averaged over {used["rounds"]} batches; noise
averages out, a bias stays. `observed` is the wrapper with `batchnorm="observed"`. {used["labeled"]} labeled inputs and
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

The Kronecker kind projects a layer's input and the gradient of its output to k channels each, and multiplies the two:
the per-sample gradient is never formed. Weights with no more than k rows or columns stay exact, and so do biases and
scales of norms. Both views get the same matrices, which follow from the seed alone, in every engine, chunk and
process. `resample_every=1` draws new ones for every call; the count of calls is part of `gc.state_dict()`.
`"gaussian"` multiplies the formed gradient by one dense matrix and costs more than the exact term: it is for studies.

Squared norms and inner products are right on average, with a variance of order 1/k. The cosine's error is smaller,
because numerator and denominator err together, but it has a bias of order 1/k. On {MODEL}, the root mean square error
of a squared norm and of a cosine is {ranks[4]["norm_error"]:.2f} and {ranks[4]["cosine_error"]:.3f} at k = 4,
{ranks[32]["norm_error"]:.2f} and {ranks[32]["cosine_error"]:.3f} at k = 32 ({used["samples"]} pairs, {used["draws"]}
draws).
"""
