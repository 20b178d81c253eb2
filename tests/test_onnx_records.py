"""Which batch norms of an ONNX file are noted as ones that could be folded."""

import numpy as np
import pytest

pytest.importorskip("onnx")

import onnx

from batchnorm.diagnose.findings import Finding
from batchnorm.diagnose.rules import examine
from batchnorm.errors import ArgumentError
from batchnorm.onnx import network_of_onnx
from onnx_models import array, convolutions, model, norm

AFTER = "y = BatchNormalization(z, s, b, m, v)"


def noted(proto, folder) -> list[Finding]:
    onnx.save(proto, folder / "net.onnx")
    return list(examine(network_of_onnx(folder / "net.onnx"), "BN501", None))


READERS = {
    "read": "r = Relu(z)",
    "returned": "",
    "read further inside": """r = If(k)<then_branch = tt () => (T[A, B, D, E] ri) { ri = Relu(z) },
        else_branch = ff () => (T[F, G, I, J] ro) { ro = Identity(x) }>""",
}


@pytest.mark.parametrize("reader", READERS)
def test_output_that_a_graph_inside_of_a_node_reads_is_shared(tmp_path, reader):
    output = "z" if reader == "returned" else "r"
    body = f"""z = Conv(x, w) {AFTER}
        q = If(k)<then_branch = t () => (T[A0, B0, D0, E0] {output}) {{ {READERS[reader]} }},
            else_branch = f () => (T[F0, G0, I0, J0] e) {{ e = Identity(x) }}>"""
    outputs = ", T[N, C1, H1, W1] q"
    assert not noted(convolutions(body, inputs=", bool k", outputs=outputs), tmp_path)
    body = body.replace("(z)", "(x)").replace("] z)", "] x)")
    assert len(noted(convolutions(body, inputs=", bool k", outputs=outputs), tmp_path)) == 1


@pytest.mark.parametrize(
    ("shape", "count"),
    [("[5, 3]", 1), ("[N, 3]", 1), ("[2, 4, 3]", 0), ("[2, 4, 4, 3]", 0), ("", 0)],
)
def test_features_of_a_matrix_product_are_channels_if_it_has_two_axes(tmp_path, shape, count):
    text = (
        f"(float{shape} x) => (float{shape.replace('3]', '4]')} y) {{ z = MatMul(x, w) {AFTER} }}"
    )
    assert len(noted(model(text, w=array(3, 4), **norm(4)), tmp_path)) == count


@pytest.mark.parametrize(("epsilon", "count"), [(0.0, 1), (-1e-3, 0)])
def test_negative_epsilon_cannot_be_folded(tmp_path, epsilon, count):
    proto = convolutions("z = Conv(x, w) " + AFTER)
    proto.graph.node[1].attribute.append(onnx.helper.make_attribute("epsilon", epsilon))
    assert len(noted(proto, tmp_path)) == count


@pytest.mark.parametrize("variance", [0.0, np.nan])
def test_variance_that_gives_no_factor_cannot_be_folded(tmp_path, variance):
    proto = convolutions("z = Conv(x, w) " + AFTER, more={"v": np.full(4, variance, np.float32)})
    proto.graph.node[1].attribute.append(onnx.helper.make_attribute("epsilon", 0.0))
    assert not noted(proto, tmp_path)


def test_names_that_are_no_text_are_an_error(tmp_path):
    """Protobuf reads them as bytes."""
    content = convolutions("z = Conv(x, w) " + AFTER).SerializeToString()
    (tmp_path / "net.onnx").write_bytes(content.replace(b"Conv", b"Con\xff"))
    with pytest.raises(ArgumentError, match=r"net.onnx: must have names in UTF-8, got b'Con\\xff'"):
        network_of_onnx(tmp_path / "net.onnx")


@pytest.mark.parametrize("channels", [{"v": 3}, dict.fromkeys("sbmv", 0)])
def test_parameters_that_do_not_fit_together_are_an_error(tmp_path, channels):
    more = {name: np.ones(number, np.float32) for name, number in channels.items()}
    with pytest.raises(ArgumentError, match=r"net.onnx: 'bn' must have .* of one shape \(C,\)"):
        noted(convolutions("[bn] " + AFTER.replace("(z", "(x"), more=more), tmp_path)


def test_names_that_the_file_gives_to_others_are_not_made_up(tmp_path):
    body = f"[BatchNormalization_1] z = Relu(x) {AFTER}"
    onnx.save(convolutions(body), tmp_path / "net.onnx")
    (layer,) = network_of_onnx(tmp_path / "net.onnx").layers
    assert layer.name == "BatchNormalization_1 (output 'y')"


def test_weights_of_other_layers_are_not_read(tmp_path):
    proto = convolutions("z = Conv(x, w) " + AFTER)
    tensor = next(t for t in proto.graph.initializer if t.name == "w")
    tensor.raw_data = tensor.raw_data[:5]
    assert len(noted(proto, tmp_path)) == 1
