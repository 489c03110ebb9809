"""Products with many rows of activations on compute capability 9.0: every shape of tile, at its edges."""

from __future__ import annotations

import pytest
import torch

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bnb_cuda.tuning import Path, Plan

pytestmark = pytest.mark.gpu

#: Relative error in the norm of a result that is rounded to the dtype once.
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4}


@pytest.fixture(autouse=True)
def on_hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("these kernels are those of compute capability 9.0")
    torch.manual_seed(0)


def assert_close(result, truth, dtype):
    error = ((result.double() - truth).norm() / truth.norm()).item()
    assert error < TOLERANCE[dtype], error


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("outliers", [0, 1, 20, 40])
@pytest.mark.parametrize(("n", "k"), [(64, 16), (100, 272), (77, 128), (4100, 1088), (14336, 512), (4096, 4096)])
def test_int8(n, k, outliers, dtype):
    threshold = 6.0 if outliers else 0.0
    codes, stats, _ = F.int8_vectorwise_quant(torch.randn(n, k, device="cuda", dtype=dtype) * 0.05)
    weight = codes.double() * stats.double()[:, None] / 127
    for rows in (17, 24, 33, 64, 65, 72, 128, 129, 136, 200, 256, 300, 512, 1000):
        x = torch.randn(rows, k, device="cuda", dtype=dtype).clamp(-5, 5)
        columns = torch.randperm(k, device="cuda")[:outliers]
        x[:, columns] = (torch.randn(rows, len(columns), device="cuda") * 10).to(dtype)
        bias = torch.randn(n, device="cuda", dtype=dtype) if rows % 2 else None
        x_codes, x_stats, listed = F.int8_vectorwise_quant(x, threshold=threshold)
        truth = (x_codes.double() * x_stats.double()[:, None] / 127) @ weight.t()
        if listed is not None:
            truth += x[:, listed].double() @ weight[:, listed].t()
        if bias is not None:
            truth += bias.double()
        assert_close(torch.ops.bitsandbytes.int8_linear(x, codes, stats, threshold, bias), truth, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize(("quant_type", "blocksize"), [("nf4", 64), ("fp4", 128), ("nf4", 4096)])
@pytest.mark.parametrize(("n", "k"), [(16, 64), (77, 2048), (257, 320), (1000, 192), (4100, 1088), (14336, 512)])
def test_wide_4bit(n, k, quant_type, blocksize, nested, dtype, monkeypatch):
    monkeypatch.setattr("bnb_cuda.matmul.plan", lambda *sizes: Plan(Path.WIDE))
    check_4bit(n, k, quant_type, blocksize, nested, dtype, (1, 100, 129, 136, 160, 256, 257, 300, 513, 1000))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize(("n", "k"), [(100, 2048), (257, 1024), (4096, 1024)])
def test_groups_4bit(n, k, split, nested, dtype, monkeypatch):
    """Rows that tiles share evenly, and rows of which the last tile has fewer."""
    monkeypatch.setattr("bnb_cuda.matmul.plan", lambda *sizes: Plan(Path.GROUPS, split))
    check_4bit(n, k, "nf4", 64, nested, dtype, (17, 24, 32, 33, 40, 65, 72, 127, 129, 136, 200, 255, 256, 300))


def check_4bit(n, k, quant_type, blocksize, nested, dtype, all_rows):
    """The product is that of the dequantized weight."""
    weight = torch.randn(n, k, device="cuda", dtype=dtype) * 0.02
    packed, state = F.quantize_4bit(weight, quant_type=quant_type, blocksize=blocksize, compress_statistics=nested)
    # Decoded values are rounded as those of a dequantized weight.
    exact = F.dequantize_4bit(packed, state).double()
    for rows in all_rows:
        x = torch.randn(rows, k, device="cuda", dtype=dtype)
        bias = torch.randn(n, device="cuda", dtype=dtype) if rows % 2 else None
        truth = x.double() @ exact.t() + (0 if bias is None else bias.double())
        assert_close(bnb.matmul_4bit(x, packed.t(), quant_state=state, bias=bias), truth, dtype)
