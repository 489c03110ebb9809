"""Differentiable products with quantized weights."""
