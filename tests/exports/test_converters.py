"""ONNX, OpenVINO and TFLite give the outputs of the model, for a batch of fixed and of any size."""

import jax
import numpy as np
import pytest

from tests.exports.nets import NAMES, X, programs

LARGER = np.concatenate([X, 2 * X, X[:1]])
pytestmark = pytest.mark.slow


def assert_same(converted, expected):
    # Another order of the sums of a convolution and of a mean: some roundings at the largest output.
    np.testing.assert_allclose(converted, expected, rtol=0, atol=1e-5 * abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
def test_onnx_computes_the_same(name):
    jax2onnx, onnxruntime = pytest.importorskip("jax2onnx"), pytest.importorskip("onnxruntime")
    program = programs()[name]

    def run(batch, x):
        model = jax2onnx.to_onnx(lambda x: program(x), [(batch, *X.shape[1:])])
        session = onnxruntime.InferenceSession(model.SerializeToString())
        return session.run(None, {session.get_inputs()[0].name: x})[0], {node.op_type for node in model.graph.node}

    y, operations = run(len(X), X)
    assert_same(y, np.asarray(program(X)))
    assert_same(run("B", LARGER)[0], np.asarray(program(LARGER)))
    # What runs in evaluation alone: no loop, no branch, and for a folded net no scale either.
    assert not operations & {"If", "Loop", "Scan"}
    assert "folded" not in name or not operations & {"Mul", "Sub", "Sqrt", "BatchNormalization"}


@pytest.mark.parametrize("name", NAMES)
def test_openvino_computes_the_same(name):
    openvino = pytest.importorskip("openvino")
    program = programs()[name]
    model = openvino.convert_model(jax.make_jaxpr(program)(X))
    # Otherwise a CPU may compute in bfloat16.
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (y,) = compiled({0: X}).values()
    assert_same(y, np.asarray(program(X)))


@pytest.mark.parametrize("name", NAMES)
def test_tflite_computes_the_same(name):
    tensorflow = pytest.importorskip("tensorflow")
    jax2tf = pytest.importorskip("jax.experimental.jax2tf")
    program = programs()[name]
    function = tensorflow.function(
        jax2tf.convert(program), input_signature=[tensorflow.TensorSpec(X.shape)], autograph=False
    )
    converter = tensorflow.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function()])
    interpreter = tensorflow.lite.Interpreter(model_content=converter.convert())
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], X)
    interpreter.invoke()
    y = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    assert_same(y, np.asarray(program(X)))
