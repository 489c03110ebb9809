"""Downstream libraries find the package, its version and its devices."""

import importlib.metadata
import inspect

import accelerate.utils
import diffusers.utils.import_utils
import peft.import_utils
import pytest
import transformers.utils
from packaging.version import Version
from transformers.integrations.bitsandbytes import validate_bnb_backend_availability

import bitsandbytes as bnb


def test_transformers():
    assert transformers.utils.is_bitsandbytes_available()
    assert transformers.utils.is_bitsandbytes_available(min_version="0.48.0")
    assert validate_bnb_backend_availability(raise_exception=True)


def test_accelerate():
    assert accelerate.utils.is_bnb_available(min_version="0.48.0")
    assert accelerate.utils.is_4bit_bnb_available()
    assert accelerate.utils.is_8bit_bnb_available()
    assert accelerate.utils.is_bitsandbytes_multi_backend_available()


def test_peft():
    assert peft.import_utils.is_bnb_available()
    assert peft.import_utils.is_bnb_4bit_available()


def test_diffusers():
    assert diffusers.utils.import_utils.is_bitsandbytes_available()
    assert diffusers.utils.import_utils.is_bitsandbytes_version(">", "0.43.3")
    assert "quant_storage" in inspect.signature(bnb.nn.Linear4bit).parameters


def test_one_version_everywhere():
    assert bnb.__version__ == importlib.metadata.version("bitsandbytes")
    assert bnb.__version__ == importlib.metadata.version("bnb-core")
    assert Version("0.50.2") <= Version(bnb.__version__) < Version("0.51")


def test_named_distribution_owns_no_file_of_the_package():
    files = importlib.metadata.files("bitsandbytes")
    assert files
    assert not [file for file in files if file.parts[0] == "bitsandbytes"]


def test_attributes_that_are_read_before_use():
    assert "multi_backend" in bnb.features
    assert {"cpu", "cuda", "xpu", "mps", "hpu", "npu"} <= bnb.supported_torch_devices
    assert all(type(device) is str for device in bnb.supported_torch_devices)


@pytest.mark.parametrize("name", ["Linear4bit", "Linear8bitLt", "Params4bit", "Int8Params"])
def test_one_class_at_both_import_paths(name):
    assert getattr(bnb.nn, name) is getattr(bnb.nn.modules, name)
    assert getattr(bnb.nn, name).__name__ == name
