"""Semi-supervised methods, one per file: call each with an `SSLBatch`, and it returns a `StepOutput`.

A method is a module around the model. It computes its loss and also returns the pair of views that gradient consistency
may compare, with the pseudo-labels and mask that it used. Another argument than an `SSLBatch` raises an
`InputTypeError`; parts that are empty, or do not belong together row by row, raise an `InputShapeError`. An option that
is out of range raises a `ConfigError`.

Arguments that several methods share are described here, and the others with each class:

- `model`: any module from inputs to logits [B, C].
- `unlabeled_weight`: mu after its ramp.
- `unlabeled_ramp_steps`: number of train-mode steps over which mu grows from 0, linearly unless the class has another
  formula; 0 means no ramp. TorchSSL uses 40 % of the run for `PseudoLabel`, `PiModel` and `MeanTeacher`.
- `joint`: True forwards labeled, weak and strong inputs as one batch, so that BatchNorm sees all of them, as in
  FixMatch's reference code. False forwards labeled and strong inputs together and the weak ones separately without a
  graph, which is cheaper. `PiModel` and `MixMatch` describe their own.
- `classes`: C, which must be the number of the model's logits; otherwise a step raises a `ConfigError`.
- `samples`: N, the number of unlabeled samples. ``batch.index`` holds their positions in range(N); without it a step
  raises an `InputTypeError`, and outside that range an `InputValueError`.
- `logits_fn`: function from the model's output to logits [B, C], for models that return a tuple or another object. None
  takes the output itself, or its attribute or key ``logits``.

Logs are loss_supervised, loss_unsupervised and unlabeled_weight, and with pseudo-labels mask_rate, the mean of their
weights. Each method counts its calls in train mode in ``step``. That and all attributes listed with a class are part of
``state_dict()``. What a method remembers of predictions covers all processes, and those that are not finite leave it as
it is.

    >>> import torch
    >>> from gradconsist import SSLBatch
    >>> from gradconsist.methods import FixMatch
    >>> method = FixMatch(torch.nn.Linear(4, 3), threshold=0.5)
    >>> u = torch.randn(6, 4)
    >>> out = method(SSLBatch(torch.randn(2, 4), torch.tensor([0, 2]), u, u))
    >>> out.loss.dim(), out.pair.weight.shape
    (0, torch.Size([6]))
"""

from gradconsist.methods.fixmatch import FixMatch
from gradconsist.methods.flexmatch import FlexMatch
from gradconsist.methods.freematch import FreeMatch
from gradconsist.methods.meanteacher import MeanTeacher
from gradconsist.methods.mixmatch import MixMatch
from gradconsist.methods.pimodel import PiModel
from gradconsist.methods.pseudolabel import PseudoLabel
from gradconsist.methods.softmatch import SoftMatch
from gradconsist.methods.temporalensembling import TemporalEnsembling
from gradconsist.methods.uda import UDA

__all__ = [
    "UDA",
    "FixMatch",
    "FlexMatch",
    "FreeMatch",
    "MeanTeacher",
    "MixMatch",
    "PiModel",
    "PseudoLabel",
    "SoftMatch",
    "TemporalEnsembling",
]
