"""The page that says what the term costs and what can be traded, from benchmarks/results/frontier.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Table = Callable[[list[dict[str, Any]], dict[str, str]], str]

_ROWS = {
    "setting": "variant", "step": "ratio_median:.2fx", "peak memory": "peak_ratio:.2fx",
    "cosine, mean error": "cosine_error:.4f", "cosine, bias": "cosine_bias:+.4f", "angle of a step": "angle_mean:.1f",
    "±": "angle_deviation:.1f", "angle of the mean": "angle_of_mean:.1f", "length": "norm_ratio:.2f",
    "noise": "noise:.2f",
}  # fmt: skip
_RANKS = {
    "k": "dim", "squared norm, rms error": "norm_error:.3f", "bound": "norm_bound:.3f",
    "cosine, rms error": "cosine_error:.4f", "cosine, bias": "cosine_bias:+.4f",
}  # fmt: skip

MODEL, CHEAP = "wrn-28-2", 1.5


def _unbiased(row: dict[str, Any]) -> bool:
    return any(word in row["variant"] for word in ("max_pairs", "every"))


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
    cheap = [row for row in result["rows"] if _unbiased(row) and row["ratio_median"] <= CHEAP]
    cheapest = "; ".join(
        f"{row['variant']}: {row['ratio_median']:.2f}x, noise {row['noise']:.2f}"
        for row in sorted((row for row in cheap if row["model"] == MODEL), key=lambda row: row["noise"])
    )
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    settings = "\n\n".join(
        f"### {model}\n\n" + table([row for row in result["rows"] if row["model"] == model], _ROWS) for model in models
    )
    ranks = "\n\n".join(
        f"### {model}\n\n" + table([row for row in result["ranks"] if row["model"] == model], _RANKS)
        for model in models
    )
    return f"""# What does it cost, and what can I trade?

The exact term on all pairs makes the split FixMatch step of WRN-28-2 {default:.1f} times as long
([Evidence](../evidence.md)). Its price is one forward of both views, a backward to the layer outputs, the inner
products, and a second backward through all of that. Everything below spends less by giving something up. Know what:

| setting | what it gives up | unbiased? |
| --- | --- | --- |
| `max_pairs=n` | a random subset of the pairs of a step, rescaled | yes |
| `GGCRWrapper(every=k)` | the term in all steps but every k-th, times k | yes, over steps |
| `stop_gradient="weak"`, `"strong"` | that view's gradient is a constant | no: half of the derivative is gone |
| `encoder=...` | fewer parameters are compared | no: it is another cosine, exact for what it compares |
| `projection=RandomProjection(k)` | sketches are compared, not gradients | inner products yes, the cosine no |

![The frontier](../assets/frontier.png)

## Measured

A step with the term over the step without it, and its peak memory likewise; the error of the cosines against the exact
ones; and the angle in degrees between the term's gradient and the exact term's: of one step (mean and deviation over
the batches), and of the mean over all {used["rounds"]} batches. "Length" is the norm of the gradient over the exact
one's. "Noise" is the root mean square of what a setting adds to the gradient, over that of the gradient itself; "exact,
of another batch" is the noise that the choice of a batch makes anyway. Labeled inputs a step: {used["labeled"]}; pairs:
{used["pairs"]}; weights as initialised, strong views with noise. A gradient that is only noisy comes closer with every
batch that is averaged, one that is biased stays where it is.

{settings}

{made} {result.get("note", "")}

Read it with care: these are random weights and random inputs. What the angle means for training, no angle tells. The
time of `every` is that of one step in k; its angle compares the steps that it takes with all of them, and its noise
counts the steps without the term as an error of its whole size. `observed` is the wrapper with
`batchnorm="observed"`, held against the exact term of those statistics.

### Without bias, for at most {CHEAP:g} times the step

Of {MODEL}: {cheapest}. The gradients of single pairs agree fairly well with each other at these random
weights, so a few of them tell most of the mean; later in training they may agree less.

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

The Kronecker kind projects what a layer saw and the gradient of what it returned, from many channels to k each, and
takes the k x k product of the two: the per-sample gradient never exists. A weight with no more than k rows or columns
stays exact, and so do biases and scales of norms. Both views meet the same matrices, which follow from the seed alone,
in every engine, chunk and process; `resample_every=1` draws new ones for every call, and the count of calls is part of
`gc.state_dict()`.

`"gaussian"` multiplies the per-sample gradient, once it is formed, by one dense matrix, so it costs more than the exact
term. It is the reference for studies of what a projection does.

### Error against rank

E[PᵀP] = I makes the squared norms and inner products right on average; the variance falls like 1/k. The table has the
gradients of {used["samples"]} pairs, {used["draws"]} draws of the matrices, and the bound of
[`RandomProjection`](../api/index.md) on the expected error of a squared norm, computed from the same gradients, around
which so few draws scatter. The cosine, a ratio, errs less, because numerator and denominator err together; and it has a
bias of order 1/k.

{ranks}

## What to take

`max_pairs` and `every` first: they have no bias, and their noise averages out over steps. Compare fewer layers where
the question is about those layers. A projection keeps every pair and every layer in the term, with a noise that is
known and a bias, and cannot be faster than the forwards and backwards that it leaves: look at its row above before you
take it.
"""
