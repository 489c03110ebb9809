"""Tables and maps: published values, symmetry, and the bits that upstream 0.50.2 produces."""

import json
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from bitsandbytes import functional as F
from bitsandbytes.codebooks import FP4, NF4, code_4bit, midpoints_4bit, order_4bit
from bitsandbytes.errors import ArgumentError

RECORDED = json.loads((Path(__file__).parent / "data" / "codebooks.json").read_text())
MAPS = {
    "dynamic": F.create_dynamic_map,
    "normal": F.create_normal_map,
    "linear": F.create_linear_map,
    "fp8": F.create_fp8_map,
}


@pytest.mark.parametrize("entry", RECORDED, ids=lambda entry: f"{entry['map']}-{'-'.join(map(str, entry['args']))}")
def test_maps_have_the_recorded_bits(entry):
    table = MAPS[entry["map"]](*entry["args"])
    assert table.shape == (256,)
    assert table.dtype == torch.float32
    assert zlib.crc32(table.numpy().tobytes()) == entry["crc32"]


def test_nf4_is_the_normal_map():
    normal = F.create_normal_map()
    values = torch.cat((normal[:7], normal[-8:]))
    torch.testing.assert_close(values, torch.tensor([v for v in NF4 if v != 0.0]), rtol=2e-6, atol=0)


def test_nf4_is_float32_exact():
    assert torch.equal(torch.tensor(NF4, dtype=torch.float64).float().double(), torch.tensor(NF4, dtype=torch.float64))


def test_fp4_is_a_float_with_two_exponent_bits():
    magnitudes = sorted({abs(value) * 12 for value in FP4})
    assert magnitudes == pytest.approx([0, 0.0625, 2, 3, 4, 6, 8, 12])


def test_named_types():
    for name in ("nf4", "fp4", "int4", "af4"):
        table = F.get_4bit_type(name, device="cpu")
        assert table.shape == (16,)
        assert table.abs().max() == 1.0
    assert torch.equal(F.get_4bit_type("nf4", device="cpu"), code_4bit("nf4", torch.device("cpu")))
    assert sorted(set((F.get_4bit_type("int4", device="cpu") * 7).round().tolist())) == list(range(-7, 8))


def test_named_types_refuse_what_is_not_known():
    with pytest.raises(NotImplementedError, match="int5"):
        F.get_4bit_type("int5", device="cpu")
    with pytest.raises(NotImplementedError, match="blocksize 64"):
        F.get_4bit_type("af4", device="cpu", blocksize=128)
    with pytest.raises(ArgumentError, match="exponent"):
        F.create_fp8_map(True, 5, 5, 8)


def test_order_is_ascending_and_zero_comes_first():
    for quant_type in ("nf4", "fp4"):
        table = code_4bit(quant_type, torch.device("cpu"))
        order = list(order_4bit(quant_type))
        assert sorted(order) == list(range(16))
        assert torch.equal(table[order], table.sort().values)
        assert midpoints_4bit(quant_type, torch.device("cpu")).shape == (15,)
    assert order_4bit("fp4").index(0) + 1 == order_4bit("fp4").index(8)


def test_shared_tables_can_be_saved_by_autograd_after_inference_mode():
    code = (
        "import torch; from bitsandbytes import codebooks\n"
        "with torch.inference_mode(): t = codebooks.code_4bit('nf4', torch.device('cpu'))\n"
        "assert not t.is_inference(); (torch.ones(16, requires_grad=True) * t).sum().backward()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_maps_need_no_scipy():
    code = (
        "import sys; sys.modules['scipy'] = None\n"
        "from bitsandbytes import functional as F; assert F.create_normal_map().unique().numel() == 16"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
