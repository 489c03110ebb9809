"""Two native modules: the device, which belongs to torch, and the kernels, which know nothing of torch."""

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

import bnb_native

FLAGS = ["-O2", "-Wall", "-ffp-contract=off"]

setup(
    ext_modules=[
        CppExtension("torch_mydev._C", ["csrc/device.cpp"], extra_compile_args=FLAGS),
        CppExtension(
            "bnb_mydev._C",
            ["csrc/kernels.cpp"],
            include_dirs=[bnb_native.include_dir()],
            extra_compile_args=FLAGS,
        ),
    ],
    cmdclass={"build_ext": BuildExtension},
)
