"""The evaluation of a model leaves Python: torch.export and ONNX, with a dynamic batch size."""

import pytest
import torch
from torch import nn

from ltnorm import models, registry
from ltnorm.norms import norm_layer, route

BATCH = torch.export.Dim("batch")


def trained(module, *shape):
    """In evaluation mode, after a batch in which the class groups differ."""
    torch.manual_seed(0)
    components = min(getattr(m, "components", 9) for m in module.modules())
    with route(module.train(), torch.arange(8) % components):
        module(torch.randn(8, *shape) + 2 * torch.randn(8, shape[0], *[1] * (len(shape) - 1)))
    return module.eval()


def agrees(function, module, *shape, tolerance=1e-5):
    """For batch sizes other than the one it was exported with, one image among them."""
    for batch in (1, 5):
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
        torch.testing.assert_close(function(x), module(x), rtol=tolerance, atol=tolerance)


def exported(module, *shape, strict=False):
    example, sizes = (torch.randn(3, *shape),), ({0: BATCH},)
    return torch.export.export(module, example, dynamic_shapes=sizes, strict=strict)


@pytest.mark.parametrize(
    ("name", "options", "shape", "strict"),
    [
        *((name, {}, (4, 5, 5), False) for name in registry.NORMS),
        ("compound", {}, (4, 7), True),
        ("compound", {"assign": "position"}, (4, 5, 5), True),
        ("compound", {"assign": "position"}, (4,), False),
        ("compound", {"components": 1}, (4,), False),
        ("split", {"evaluation": "balanced"}, (4, 7), False),
        ("split", {"evaluation": "posterior"}, (4, 5, 5), True),
    ],
)
def test_layers_export(name, options, shape, strict):
    layer = trained(norm_layer(name, **options)(4), *shape)
    agrees(exported(layer, *shape, strict=strict).module(), layer, *shape)


def session(program):
    """An exported program as ONNX, run by onnxruntime."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = torch.onnx.export(program, dynamo=True, verbose=False).model_proto
    run = runtime.InferenceSession(model.SerializeToString())
    [name] = [value.name for value in run.get_inputs()]
    return lambda x: torch.from_numpy(run.run(None, {name: x.numpy()})[0])


@pytest.mark.parametrize("shape", [(8, 5, 5), (8,)])
def test_onnx_layers(shape):
    layers = nn.Sequential(
        norm_layer("bn")(8),
        norm_layer("gn")(8),
        norm_layer("compound")(8),
        norm_layer("compound", assign="position")(8),
        norm_layer("split")(8),
        norm_layer("split", evaluation="posterior")(8),
    )
    trained(layers, *shape)
    agrees(session(exported(layers, *shape)), layers, *shape, tolerance=1e-4)


def test_a_model_for_images_of_any_size():
    model = models.build("resnet8", num_classes=5, norm=norm_layer("compound"))
    trained(model, 3, 8, 8)
    sizes = ({0: BATCH, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
    program = torch.export.export(model, (torch.randn(3, 3, 8, 12),), dynamic_shapes=sizes)
    agrees(program.module(), model, 3, 16, 8)
    agrees(session(program), model, 3, 16, 8, tolerance=1e-4)
