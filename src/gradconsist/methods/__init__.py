"""Semi-supervised methods, one per file: call each with an `SSLBatch`, and it returns a `StepOutput`.

A method is a module around the model. It computes its loss and also returns the pair of views that gradient consistency
may compare, with the pseudo-labels and mask that it used. Another argument than an `SSLBatch` raises an
`InputTypeError`; parts that are empty, or do not belong together row by row, raise an `InputShapeError`.

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
