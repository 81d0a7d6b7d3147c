"""Every exception azquant raises on purpose. Each is also the builtin that fits it best.

::

    AzquantError (Exception)
    ├── ShapeError (ValueError)             an array's shape does not fit
    ├── DTypeError (TypeError)              an array's dtype does not fit
    ├── ArgumentError (ValueError)          another argument is out of its range
    ├── NonFiniteError (ValueError)         NaN or infinity where a number is needed; has .index
    ├── UnsupportedTypeError (ValueError)   a ggml type that is unknown, or cannot do what was asked
    ├── FormatError (ValueError)            a file's bytes break its format; has .path and .offset
    │   ├── GGUFError
    │   ├── ModelfileError                  a Modelfile that breaks Ollama's grammar; has .line
    │   ├── StoreError                      a model store whose files are damaged or contradict each other
    │   └── CheckpointError
    │       └── UnsafePickleError           a pickle asks for more than tensors
    ├── ModelError (ValueError)             a well-formed file that is no usable model
    ├── ConversionError (ValueError)        a checkpoint that cannot be converted as asked
    │   └── UnsupportedArchitectureError
    ├── TokenizerError (ValueError)         a tokenizer that cannot be read, carried or applied
    ├── ModelNotFoundError (LookupError)    a model that is not in the store
    ├── HubError (OSError)                  the Hub did not give or take a file
    ├── ContextLengthError (ValueError)     more tokens than the model has positions
    ├── GenerationTimeout (TimeoutError)    an answer was not finished in the time given
    ├── OutputError (OSError)               an output file that cannot be written
    ├── InputFileError (OSError)            an input file that is missing or cannot be read
    ├── OutOfMemoryError (MemoryError)      memory needed and not to be had; states how much
    ├── MissingDependencyError (ImportError) an optional package is needed; says how to install it
    └── InternalError (RuntimeError)        a state that cannot be: please report it

    AzquantWarning (UserWarning)
    ├── BackendWarning                      the NumPy fallback runs instead of the C kernels
    └── ConversionWarning                   something was replaced or left out on the way

A message says what was found, where (file, key, tensor, byte offset) and what to do about it.
"""

from __future__ import annotations

from os import PathLike, fspath

__all__ = [
    "ArgumentError",
    "AzquantError",
    "AzquantWarning",
    "BackendWarning",
    "CheckpointError",
    "ContextLengthError",
    "ConversionError",
    "ConversionWarning",
    "DTypeError",
    "FormatError",
    "GGUFError",
    "GenerationTimeout",
    "HubError",
    "InputFileError",
    "InternalError",
    "MissingDependencyError",
    "ModelError",
    "ModelNotFoundError",
    "ModelfileError",
    "NonFiniteError",
    "OutOfMemoryError",
    "OutputError",
    "ShapeError",
    "StoreError",
    "TokenizerError",
    "UnsafePickleError",
    "UnsupportedArchitectureError",
    "UnsupportedTypeError",
]


class AzquantError(Exception):
    """Root of every exception that azquant raises on purpose."""


class ShapeError(AzquantError, ValueError):
    """An array's shape does not fit what it is used for."""


class DTypeError(AzquantError, TypeError):
    """An array's dtype does not fit what it is used for."""


class ArgumentError(AzquantError, ValueError):
    """An argument is outside its range."""


class NonFiniteError(AzquantError, ValueError):
    """NaN or infinity where only finite numbers can be quantized.

    ``index`` is the flat (C order) position of the first such element, ``tensor`` its name where known.
    """

    def __init__(self, message: str, *, index: int, tensor: str | None = None) -> None:
        super().__init__(message)
        self.index = index
        self.tensor = tensor


class UnsupportedTypeError(AzquantError, ValueError):
    """A ggml type that is unknown, or that cannot do what was asked of it."""


class FormatError(AzquantError, ValueError):
    """A file whose bytes break its format. ``offset`` is the byte position, ``None`` if it has none."""

    def __init__(
        self, message: str, *, path: str | PathLike[str] | None = None, offset: int | None = None
    ) -> None:
        self.path = None if path is None else fspath(path)
        self.offset = offset
        where = "" if self.path is None else f"{self.path}: "
        at = "" if offset is None else f" (at byte {offset})"
        super().__init__(f"{where}{message}{at}")


class GGUFError(FormatError):
    """A GGUF file that breaks the format."""


class ModelfileError(FormatError):
    """A Modelfile that breaks Ollama's grammar. ``line`` counts from 1, ``None`` if it is about no line."""

    def __init__(
        self, message: str, *, path: str | PathLike[str] | None = None, line: int | None = None
    ) -> None:
        self.line = line
        super().__init__(message if line is None else f"line {line}: {message}", path=path)


class StoreError(FormatError):
    """A model store with a damaged file: a manifest, or a blob that is not what its name says."""


class CheckpointError(FormatError):
    """A checkpoint (safetensors, pytorch_model.bin, .pt, its index or config) that cannot be read."""


class UnsafePickleError(CheckpointError):
    """A pickle that asks for more than tensors and plain containers. Nothing of it was executed."""


class ModelError(AzquantError, ValueError):
    """A well-formed file that does not hold a model azquant can run."""


class ConversionError(AzquantError, ValueError):
    """A checkpoint that cannot be converted as asked."""


class UnsupportedArchitectureError(ConversionError):
    """A model architecture azquant does not know."""


class TokenizerError(AzquantError, ValueError):
    """A tokenizer that cannot be read, carried into GGUF, or applied to the text given."""


class ModelNotFoundError(AzquantError, LookupError):
    """A model that is not in the store."""


class HubError(AzquantError, OSError):
    """A file or repository that the Hub did not give or take: missing, gated, cut short, or altered."""


class ContextLengthError(AzquantError, ValueError):
    """More tokens than the model has positions for."""


class GenerationTimeout(AzquantError, TimeoutError):
    """An answer was not finished in the time given."""


class OutputError(AzquantError, OSError):
    """An output file that cannot be written. Whatever stood at its place before is untouched."""


class InputFileError(AzquantError, OSError):
    """An input file or folder that is missing or cannot be read."""


class OutOfMemoryError(AzquantError, MemoryError):
    """Memory that was needed and could not be had."""


class MissingDependencyError(AzquantError, ImportError):
    """An optional package is needed for what was asked."""


class InternalError(AzquantError, RuntimeError):
    """A state that azquant's own checks should have made impossible. Please report it."""


class AzquantWarning(UserWarning):
    """Root of azquant's warnings."""


class BackendWarning(AzquantWarning):
    """The NumPy fallback runs instead of the C kernels."""


class ConversionWarning(AzquantWarning):
    """Something was replaced, padded or left out while converting."""
