"""Adapters: attach gradient consistency to objects of other frameworks, without changing your classes.

`gradconsist.adapters.lightning` is for a `LightningModule`, `gradconsist.adapters.usb` for algorithms of ``semilearn``
(USB). An adapter does not import its framework: it recognises your object by its methods. The handle's ``detach()``
undoes everything that ``attach`` changed.
"""
