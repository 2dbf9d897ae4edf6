"""What a call is given: batches of tensors, pairs of views, options, parameters, and the default cross-entropy.

Everything is checked here, once: the rest of the library meets normal forms only. Knows nothing of how a model is run.
"""
