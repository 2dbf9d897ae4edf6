"""Gradient consistency for training objects of other frameworks, attached to them from outside.

`gradconsist.adapters.usb` is for algorithms of ``semilearn`` (USB). An adapter imports nothing of its framework: it
works on the object that the user built, and its handle's ``detach()`` gives that object back as it was.
"""
