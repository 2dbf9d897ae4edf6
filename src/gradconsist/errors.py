"""The errors that gradconsist raises.

Each derives from `GradConsistError` and from the built-in class that fits, so ``except ValueError`` keeps working.
A message names the argument or the module's path, says what was found, and ends with what to do.
"""


class GradConsistError(Exception):
    """Base class: catch it to catch every error that this library raises on purpose."""


class ConfigError(GradConsistError, ValueError):
    """An option has an invalid value, or two options do not go together."""


class InputTypeError(GradConsistError, TypeError):
    """A view, target or weight is not a usable tensor, or dict, tuple or list of tensors and constants."""


class InputShapeError(GradConsistError, ValueError):
    """The sizes of views, target and weight do not match."""


class InputValueError(GradConsistError, ValueError):
    """A target or weight has entries out of range, or the two views hold different constants."""


class NonFiniteError(GradConsistError, ValueError):
    """A per-sample gradient is NaN or infinite."""


class DeviceError(GradConsistError, ValueError):
    """Model and inputs are not on one device."""


class GradModeError(GradConsistError, RuntimeError):
    """The loss was called where no graph can be built; `measure` works there."""


class ParameterSelectionError(GradConsistError, ValueError):
    """`encoder` selects no trainable parameter, or something that is not part of the model."""


class LossContractError(GradConsistError, ValueError):
    """`loss_fn`, the model or a wrapped method returned something of the wrong type or shape."""


class ModelError(GradConsistError, RuntimeError):
    """The model's forward or `loss_fn` raised an error from torch or Python, kept as ``__cause__``."""


class UnsupportedModuleError(GradConsistError, NotImplementedError):
    """The result cannot be exact with this module or operation; the message says what to use instead."""


class StateError(GradConsistError, ValueError):
    """A `state_dict` does not belong to this object."""
