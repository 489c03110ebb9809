"""Facade for the old import path of the CUDA backend; the kernels live in the wheel ``bnb-cuda``."""
