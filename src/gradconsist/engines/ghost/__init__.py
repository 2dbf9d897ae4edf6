"""Layer-wise inner products of per-sample gradients, differentiable, without the gradients themselves."""

from gradconsist.engines.ghost.engine import GhostEngine

__all__ = ["GhostEngine"]
