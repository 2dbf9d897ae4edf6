"""What the loss does with a model, whether it is right, what it costs, and what it does to the model.

`check` lists, before training, how each parameter of a model is treated. `verify` tests the gradient of L_g on a model
by finite differences. `check_rule` tests a layer, and a rule registered for it, against the per-sample loop.
`memory_report` predicts and measures time and memory of every setting and recommends one. `sharpness` and
`top_eigenvalue` tell how flat the loss is around the weights, and `consistency_bound` measures both sides of the
paper's Proposition 1.

    >>> import torch
    >>> from gradconsist import diagnostics
    >>> _ = torch.manual_seed(0)
    >>> model, weak = torch.nn.Linear(4, 3), torch.randn(8, 4)
    >>> print(diagnostics.check(model, weak, weak + 0.1, model(weak).argmax(1)))
    exact, by GhostEngine(form='auto')
      parameter  in      entries  compared by
      weight     Linear       12  linear, gram form
      bias       Linear        3  bias, gradient form
    >>> diagnostics.verify(model, weak, weak + 0.1, model(weak).argmax(1)).ok
    True
"""

from gradconsist.diagnostics.bound import BoundReport, consistency_bound
from gradconsist.diagnostics.differences import DirectionError, VerifyReport, verify
from gradconsist.diagnostics.flatness import EigenvalueReport, SharpnessReport, sharpness, top_eigenvalue
from gradconsist.diagnostics.memory import CostReport, memory_report
from gradconsist.diagnostics.routes import CheckReport, CheckRow, check
from gradconsist.diagnostics.rules import RuleReport, check_rule
from gradconsist.diagnostics.trials import CostRow

__all__ = [
    "BoundReport",
    "CheckReport",
    "CheckRow",
    "CostReport",
    "CostRow",
    "DirectionError",
    "EigenvalueReport",
    "RuleReport",
    "SharpnessReport",
    "VerifyReport",
    "check",
    "check_rule",
    "consistency_bound",
    "memory_report",
    "sharpness",
    "top_eigenvalue",
    "verify",
]
