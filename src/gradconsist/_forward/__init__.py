"""Runs the user's model so that each per-sample loss depends on its own sample only.

`per_sample` is the forward. Inside it, `batchnorm` holds statistics constant, `exact_operators` replaces operators of
torch with a wrong second derivative, and `remembered` restores what modules keep between forwards. `statistics` takes
BatchNorm's joint statistics, `observer` those of a method's forward. `sandbox`, `isolation` and `randomness` protect
the process and the model around a forward.
"""
