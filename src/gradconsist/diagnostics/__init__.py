"""Diagnostics: how the loss handles your model, whether its gradient is right, what it costs and what it achieves.

`check` lists, before training, how the loss handles each parameter of a model. `verify` tests the gradient of L_g on a
model by finite differences. `memory_report` measures time and memory of many settings and recommends one.
`consistency_bound` measures both sides of the paper's Proposition 1. All four take the loss itself, so they look at
what you train. `check_rule` tests a layer, and a rule registered for it, against the per-sample loop. `sharpness` and
`top_eigenvalue` measure how flat the loss is around the weights.

    >>> import torch
    >>> from gradconsist import GradientConsistencyLoss, diagnostics
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    >>> gc, weak = GradientConsistencyLoss(model, encoder=model[0]), torch.randn(8, 4)
    >>> print(diagnostics.check(gc, weak, weak + 0.1, model(weak).argmax(1)))
    exact, by GhostEngine(form='auto')
      parameter  in      entries  compared by
      0.weight   Linear       32  linear, gram form
      0.bias     Linear        8  bias, gradient form
      2.weight   Linear       24  not compared; L_g is differentiated for it
      2.bias     Linear        3  not compared; L_g is differentiated for it
    >>> diagnostics.verify(gc, weak, weak + 0.1, model(weak).argmax(1)).ok
    True
"""

from gradconsist.diagnostics.bound import BoundReport, consistency_bound
from gradconsist.diagnostics.check import CheckReport, CheckRow, check
from gradconsist.diagnostics.check_rule import RuleReport, check_rule
from gradconsist.diagnostics.flatness import EigenvalueReport, SharpnessReport, sharpness, top_eigenvalue
from gradconsist.diagnostics.memory import CostReport, CostRow, memory_report
from gradconsist.diagnostics.verify import DirectionError, VerifyReport, verify

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
