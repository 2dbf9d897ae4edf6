"""Computes inner products of per-sample gradients layer by layer, differentiably, without forming the gradients.

For one sample, the gradient of a linear layer's weight is the outer product of the output gradient d and the input a.
So the inner product of two such gradients is that of the inputs times that of the output gradients:

    ⟨d aᵀ, d' a'ᵀ⟩ = ⟨a, a'⟩ ⟨d, d'⟩

Positions of a sequence or an image add up on both sides. `rules` has such a formula for each kind of layer. `capture`
and `operators` record every call of an operator with a compared parameter, inside modules or not. `engine` adds up the
parts. For a parameter without a rule, the per-sample gradient is formed.

    >>> import torch
    >>> from gradconsist import GradientConsistencyLoss
    >>> _ = torch.manual_seed(0)
    >>> layer, a, b = torch.nn.Linear(4, 3, bias=False), torch.randn(1, 4), torch.randn(1, 4)
    >>> target = torch.tensor([0])
    >>> record = GradientConsistencyLoss(layer, engine="ghost").measure(a, b, target)
    >>> d, e = (layer(x).softmax(1) - torch.eye(3)[:1] for x in (a, b))  # the gradients of the logits
    >>> by_hand = (a * b).sum() * (d * e).sum() / (a.norm() * b.norm() * d.norm() * e.norm())
    >>> torch.allclose(record.cosine, by_hand)
    True
"""

from gradconsist.engines.ghost.engine import GhostEngine
from gradconsist.engines.ghost.registered import register_rule, unregister_rule

__all__ = ["GhostEngine", "register_rule", "unregister_rule"]
