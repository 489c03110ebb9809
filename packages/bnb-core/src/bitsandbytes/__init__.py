"""bitsandbytes: 4-bit and 8-bit quantization, layers and optimizers for PyTorch.

Importing the package defines every op with its reference implementation, then loads the installed
backend plugins, which bring native kernels for their devices.
"""

#: The upstream API level that this package implements. Known before any plugin loads: plugins and
#: downstream libraries compare it.
__version__ = "0.50.2"

#: Read by downstream libraries to tell that devices other than CUDA are supported.
features = {"multi_backend"}

#: Device types that layers may be placed on; a device without a backend runs on the reference.
supported_torch_devices = {"cpu", "cuda", "xpu", "hpu", "npu", "mps"}

from bitsandbytes import _ops, consts, errors, functional, utils  # noqa: E402
from bitsandbytes.autograd._functions import MatmulLtState, matmul, matmul_4bit  # noqa: E402
from bitsandbytes.nn import modules  # noqa: E402
from bitsandbytes.optim import adam  # noqa: E402


def _import_backends() -> None:
    """Load the installed backend plugins; runs once, at the end of this import."""
    from bitsandbytes.backends.discovery import load_plugins

    load_plugins()


_import_backends()

__all__ = [
    "MatmulLtState",
    "__version__",
    "_ops",
    "adam",
    "consts",
    "errors",
    "features",
    "functional",
    "matmul",
    "matmul_4bit",
    "modules",
    "supported_torch_devices",
    "utils",
]
