"""Gradient consistency in training code of other frameworks, attached to their objects from outside.

`gradconsist.adapters.lightning` is for a `LightningModule`, `gradconsist.adapters.usb` for algorithms of ``semilearn``
(USB). An adapter imports nothing of its framework: it knows the object that the user built by its methods, and its
handle's ``detach()`` gives that object back as it was.
"""
