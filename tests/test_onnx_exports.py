"""`batchnorm.onnx.fold` on what PyTorch's exporters write."""

import io
import warnings

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx
import torch
from torch import nn

import batchnorm.torch
from batchnorm.onnx import fold
from foldable import filled
from onnx_models import operators


class Net(nn.Module):
    """One of each kind of pair, two batch norms that must stay, and a loop."""

    def __init__(self, norm):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), norm(8), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 5, padding=2, groups=8), norm(8), nn.SiLU())
        self.wide, self.wide_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8)
        self.point, self.point_norm = nn.Conv2d(8, 8, 1, bias=False), norm(8)
        self.beside = norm(8)
        self.shared, self.first, self.second = nn.Conv2d(8, 8, 1), norm(8), norm(8)
        self.before, self.last = norm(8), nn.Conv2d(8, 6, 3)
        self.up = nn.Sequential(nn.ConvTranspose2d(6, 4, 2, 2, bias=False), norm(4))
        self.head = nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5))

    def forward(self, x):
        x = self.depthwise(self.stem(x))
        sums = self.wide_norm(self.wide(x)) + self.point_norm(self.point(x)) + self.beside(x)
        x = sums.relu()
        y = self.shared(x)
        x = (self.first(y) + self.second(y)).relu()
        x = self.up(self.last(self.before(x)))
        return self.head(x.mean((2, 3)))


def exported(model, x, dynamo):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            program = torch.onnx.export(model, (x,), dynamo=True, optimize=False, verbose=False)
            return program.model_proto
        file = io.BytesIO()
        torch.onnx.export(
            model, (x,), file, dynamo=False, do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
        )  # fmt: skip
    return onnx.load_from_string(file.getvalue())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, batchnorm.torch.BatchNorm2d])
@pytest.mark.parametrize("dynamo", [False, True])
def test_fold_folds_what_pytorch_exports(dynamo, norm):
    torch.manual_seed(0)
    model = filled(Net(norm))
    x = torch.randn(2, 3, 12, 12)
    proto = exported(model, x, dynamo)
    folded, report = fold(proto, {proto.graph.input[0].name: x.numpy()})
    assert operators(folded.graph).count("BatchNormalization") == 2
    assert len(report.folded) == 8
    assert all("also goes to" in why for why in report.refused.values())
    assert len(report.refused) == 2
    assert report.share <= 1
    session = onnx.reference.ReferenceEvaluator(folded)
    (got,) = session.run(None, {proto.graph.input[0].name: x.numpy()})
    with torch.no_grad():
        expected = model.double()(x.double())
    np.testing.assert_allclose(got, expected, atol=1e-4 * float(abs(expected).max()))
