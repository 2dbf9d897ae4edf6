"""Layer-wise inner products of per-sample gradients, differentiable, without the gradients themselves."""

from gradconsist.engines.ghost.engine import GhostEngine
from gradconsist.engines.ghost.layers import register_rule, unregister_rule

__all__ = ["GhostEngine", "register_rule", "unregister_rule"]
