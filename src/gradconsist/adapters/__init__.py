"""Gradient consistency in training code of other frameworks, whose objects stay as they are.

`gradconsist.adapters.lightning` attaches the term to a `LightningModule`. Nothing of the framework is imported here:
its objects are known by their methods.
"""
