"""Layers and an optimizer of bitsandbytes on a device that neither torch nor bitsandbytes knows.

The device comes with an extension of torch, its kernels with a backend that bitsandbytes finds by its
entry point. Nothing of bitsandbytes is patched or imported from below its public names::

    pip install --no-build-isolation --no-deps .
    python run.py
"""

from __future__ import annotations

import torch
import torch_mydev  # noqa: F401  (torch 2.5 and later load it by themselves)
from bnb_mydev.ops import launches

import bitsandbytes as bnb

DEVICE = "mydev"
STEPS = 60


def launches_of(name: str, before: int) -> None:
    """Tell how many kernels of the backend were launched."""
    print(f"  {name}: {launches() - before} kernels of the backend launched")


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance of two tensors relative to the second."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return float((actual - expected).norm() / expected.norm())


def linear_4bit(dtype: torch.dtype) -> None:
    """A 4-bit layer gives what its own decoded weight gives in float64, forward and backward."""
    before = launches()
    layer = bnb.nn.Linear4bit(96, 64, compute_dtype=dtype, quant_type="nf4", compress_statistics=False).to(DEVICE)
    x = torch.randn(5, 96, dtype=dtype).to(DEVICE).requires_grad_()
    out = layer(x)
    assert out.device.type == DEVICE
    weight = bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state).cpu().double()
    expected = x.detach().cpu().double() @ weight.T + layer.bias.detach().cpu().double()
    error = relative_error(out, expected)
    out.float().sum().backward()
    gradient = relative_error(x.grad, torch.ones(5, 64, dtype=torch.float64) @ weight)
    print(f"Linear4bit, {dtype}: relative error {error:.1e}, of the gradient {gradient:.1e}")
    assert max(error, gradient) < (1e-5 if dtype is torch.float32 else 1e-2)
    launches_of("Linear4bit", before)
    assert launches() > before


def linear_8bit() -> None:
    """An int8 layer stays within the error of quantization of the float layer, with and without outliers."""
    for threshold in (0.0, 6.0):
        before = launches()
        plain = torch.nn.Linear(96, 64)
        layer = bnb.nn.Linear8bitLt(96, 64, has_fp16_weights=False, threshold=threshold)
        layer.load_state_dict(plain.state_dict())
        layer = layer.to(DEVICE)
        x = torch.randn(5, 96)
        x[:, 7] *= 10
        error = relative_error(layer(x.half().to(DEVICE)), plain(x))
        print(f"Linear8bitLt, threshold {threshold:g}: relative error {error:.1e}")
        assert error < 0.03
        launches_of("Linear8bitLt", before)


def optimizer_8bit() -> None:
    """An 8-bit optimizer brings a small regression down as far as torch's own does."""
    torch.manual_seed(0)
    x = torch.randn(256, 64)
    y = x @ torch.randn(64, 64) / 8
    losses = {}
    for name, place in (("AdamW", "cpu"), ("AdamW8bit", DEVICE)):
        torch.manual_seed(1)
        model = torch.nn.Linear(64, 64).to(place)
        make = torch.optim.AdamW if name == "AdamW" else bnb.optim.AdamW8bit
        options = {} if name == "AdamW" else {"min_8bit_size": 0}
        optimizer = make(model.parameters(), lr=0.05, **options)
        for _step in range(STEPS):
            optimizer.zero_grad()
            loss = (model(x.to(place)) - y.to(place)).square().mean()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
        if place == DEVICE:
            state = optimizer.state[model.weight]
            assert (state["state1"].dtype, state["state1"].device.type) == (torch.uint8, DEVICE)
    print(f"AdamW8bit after {STEPS} steps: loss {losses['AdamW8bit']:.4f}, torch's AdamW {losses['AdamW']:.4f}")
    assert losses["AdamW8bit"] < 2 * losses["AdamW"] + 1e-3


def main() -> None:
    """Run everything."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        linear_4bit(dtype)
    linear_8bit()
    optimizer_8bit()


if __name__ == "__main__":
    main()
