"""torch.compile on quantized layers of the real model."""

import pytest
import torch

from .conftest import load, logits

pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.mark.parametrize("name", ["nf4-nested", "int8-no-outliers"])
def test_compiled_model_gives_the_same_logits(tiny_folder, text_ids, name):
    model = load(tiny_folder, name).eval()
    expected = logits(model, text_ids[:, :33]).float()
    torch.compiler.reset()
    model.forward = torch.compile(model.forward)
    similarity = torch.nn.functional.cosine_similarity(logits(model, text_ids[:, :33]).float(), expected, dim=-1)
    assert similarity.min() > 0.999


@pytest.mark.parametrize("name", ["nf4-nested", "int8-no-outliers"])
def test_mlp_compiles_without_a_graph_break(tiny_folder, name):
    mlp = load(tiny_folder, name).eval().model.layers[0].mlp
    torch.compiler.reset()
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    for rows in (1, 7):
        inputs = torch.randn(rows, mlp.hidden_size, dtype=torch.bfloat16)
        with torch.inference_mode():
            torch.testing.assert_close(compiled(inputs), mlp(inputs), rtol=0.02, atol=0.02)
