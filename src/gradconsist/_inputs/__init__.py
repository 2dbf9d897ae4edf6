"""The arguments of a call: batches of tensors, pairs of views, options, parameters, and the default cross-entropy.

Arguments are checked and brought into a normal form here, once, so the rest of the library need not check again.
Nothing in this folder knows how a model is run.
"""
