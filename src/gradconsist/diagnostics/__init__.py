"""What the loss does with a model, and whether it is right.

`check` lists, before training, how each parameter of a model is treated. `verify` tests the gradient of L_g on a model
by finite differences. `check_rule` tests a layer, and a rule registered for it, against the per-sample loop.
"""

from gradconsist.diagnostics.differences import DirectionError, VerifyReport, verify
from gradconsist.diagnostics.routes import CheckReport, CheckRow, check
from gradconsist.diagnostics.rules import RuleReport, check_rule

__all__ = [
    "CheckReport",
    "CheckRow",
    "DirectionError",
    "RuleReport",
    "VerifyReport",
    "check",
    "check_rule",
    "verify",
]
