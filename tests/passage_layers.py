"""Real batch-norm layers of every framework behind one face, for the tests of batchnorm.passage.

A layer is built with the settings that `write` gives, loads and returns arrays as its framework's
users have them, trains on batches (N, C, H, W) and evaluates them; where its channels are last, it
transposes. `name` is the layer's name among the arrays.
"""

import os
import warnings

import numpy as np
import pytest

CHANNELS = 4


class _Layer:
    name = ""

    def __init__(self, **settings):
        self.settings = settings
        self.last = settings.get("axis", settings.get("channel_axis", 1)) == -1

    def _put(self, x):
        return np.moveaxis(x, 1, -1) if self.last else x

    def _get(self, y):
        y = np.asarray(y)
        return np.moveaxis(y, -1, 1) if self.last else y


class Torch(_Layer):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.torch = pytest.importorskip("torch")
        self.layer = self.torch.nn.BatchNorm2d(CHANNELS, **settings)

    def load(self, arrays):
        self.layer.load_state_dict({k: self.torch.from_numpy(v) for k, v in arrays.items()})

    def arrays(self):
        return self.layer.state_dict()

    def train(self, x):
        self.layer.train()(self.torch.from_numpy(x))

    def evaluate(self, x):
        with self.torch.no_grad():
            return self.layer.eval()(self.torch.from_numpy(x)).numpy()


class Numpy(_Layer):
    def __init__(self, **settings):
        from batchnorm import BatchNorm

        super().__init__(**settings)
        self.layer = BatchNorm(CHANNELS, **settings)

    def load(self, arrays):
        self.layer.load_state_dict(arrays)

    def arrays(self):
        return self.layer.state_dict()

    def train(self, x):
        self.layer.train()(self._put(x))

    def evaluate(self, x):
        return self._get(self.layer.eval()(self._put(x)))


class Keras(_Layer):
    name = "bn"

    def __init__(self, **settings):
        super().__init__(**settings)
        keras = import_keras()
        self.layer = keras.layers.BatchNormalization(name="bn", **settings)
        self.layer.build((None, 3, 3, CHANNELS) if self.last else (None, CHANNELS, 3, 3))

    def load(self, arrays):
        for variable in self.layer.variables:
            variable.assign(arrays.pop(variable.path))
        assert not arrays

    def arrays(self):
        return {v.path: keras_numpy(v) for v in self.layer.variables}

    def train(self, x):
        self.layer(self._put(x), training=True)

    def evaluate(self, x):
        return self._get(keras_numpy(self.layer(self._put(x), training=False)))


class Flax(_Layer):
    def __init__(self, **settings):
        super().__init__(**settings)
        linen = pytest.importorskip("flax.linen")
        self.layer = linen.BatchNorm(**settings)
        self.variables = None

    def load(self, arrays):
        x = self._put(np.zeros((2, CHANNELS, 3, 3), np.float32))
        fresh = self.layer.init(pytest.importorskip("jax").random.key(0), x, False)
        self.variables = _like(fresh, arrays)

    def arrays(self):
        return self.variables

    def train(self, x):
        _, new = self.layer.apply(self.variables, self._put(x), False, mutable=["batch_stats"])
        self.variables = {**self.variables, **new}

    def evaluate(self, x):
        return self._get(self.layer.apply(self.variables, self._put(x), True))


class Nnx(_Layer):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.nnx = pytest.importorskip("flax.nnx")
        self.layer = self.nnx.BatchNorm(CHANNELS, rngs=self.nnx.Rngs(0), **settings)

    def load(self, arrays):
        state = self.nnx.state(self.layer)
        self.nnx.replace_by_pure_dict(state, _like(self.arrays(), arrays))
        self.nnx.update(self.layer, state)

    def arrays(self):
        return self.nnx.to_pure_dict(self.nnx.state(self.layer))

    def train(self, x):
        self.layer.train()
        self.layer(self._put(x))

    def evaluate(self, x):
        self.layer.eval()
        return self._get(self.layer(self._put(x)))


class Haiku(_Layer):
    name = "batch_norm"

    def __init__(self, **settings):
        super().__init__(**settings)
        haiku = pytest.importorskip("haiku")
        self.last = settings["data_format"] == "channels_last"
        self.pure = haiku.transform_with_state(
            lambda x, training: haiku.BatchNorm(**settings)(x, training)
        )
        self.params = self.state = None

    def load(self, arrays):
        x = self._put(np.zeros((2, CHANNELS, 3, 3), np.float32))
        params, state = self.pure.init(pytest.importorskip("jax").random.key(0), x, True)
        fresh = {"params": params, "state": state} if params else {"state": state}
        arrays = _like(fresh, arrays)
        self.params, self.state = arrays.get("params", {}), arrays["state"]

    def arrays(self):
        return {"params": self.params, "state": self.state}

    def train(self, x):
        _, self.state = self.pure.apply(self.params, self.state, None, self._put(x), True)

    def evaluate(self, x):
        return self._get(self.pure.apply(self.params, self.state, None, self._put(x), False)[0])


class Equinox(_Layer):
    name = "bn"
    mode, indices = "batch", {"batch_state_index", "batch_counter"}

    def __init__(self, **settings):
        super().__init__(**settings)
        self.eqx = pytest.importorskip("equinox")
        self.layer, self.state = self.eqx.nn.make_with_state(self.eqx.nn.BatchNorm)(
            CHANNELS, "batch", mode=self.mode, **settings
        )

    def load(self, arrays):
        import jax.numpy as jnp

        for name in ("weight", "bias"):
            if getattr(self.layer, name) is not None:
                value = jnp.asarray(arrays.pop(f"bn.{name}"))
                at = lambda layer, name=name: getattr(layer, name)  # noqa: E731
                self.layer = self.eqx.tree_at(at, self.layer, value)
        for name in self.indices:
            parts = [key for key in arrays if key.startswith(f"bn.{name}")]
            value = tuple(jnp.asarray(arrays.pop(key)) for key in sorted(parts))
            if not name.endswith("state_index"):
                value = value[0].item()  # its type is that of Python's numbers
            self.state = self.state.set(getattr(self.layer, name), value)
        assert not arrays

    def arrays(self):
        found = {name: self.state.get(getattr(self.layer, name)) for name in self.indices}
        if self.layer.weight is not None:
            found |= {"weight": self.layer.weight, "bias": self.layer.bias}
        return {"bn": found}

    def _apply(self, x, inference):
        import jax

        def call(x, state):
            return self.layer(x, state, inference=inference)

        return jax.vmap(call, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
            x, self.state
        )

    def train(self, x):
        _, self.state = self._apply(x, False)

    def evaluate(self, x):
        return np.asarray(self._apply(x, True)[0])


class EquinoxEma(Equinox):
    mode, indices = "ema", {"ema_state_index", "ema_first_time_index"}


class Onnx(_Layer):
    """A node, run by ONNX's reference implementation; training gives the new state as outputs."""

    name = "bn"
    inputs = ("x", "scale", "B", "input_mean", "input_var")

    def __init__(self, **settings):
        super().__init__(**settings)
        pytest.importorskip("onnx")
        self.held = None

    def load(self, arrays):
        assert set(arrays) == {f"bn/{name}" for name in self.inputs[1:]}
        self.held = arrays

    def arrays(self):
        return self.held

    def model(self, training):
        from onnx import TensorProto, helper

        outputs = ["y", "running_mean", "running_var"] if training else ["y"]
        node = helper.make_node(
            "BatchNormalization", self.inputs, outputs, "bn", training_mode=int(training),
            **self.settings,
        )  # fmt: skip
        values = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            for name in (*self.inputs, *outputs)
        ]
        graph = helper.make_graph([node], "g", values[:5], values[5:])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=9)

    def run(self, x, training):
        from onnx.reference import ReferenceEvaluator

        inputs = {name: self.held[f"bn/{name}"] for name in self.inputs[1:]}
        return ReferenceEvaluator(self.model(training)).run(None, {"x": x, **inputs})

    def train(self, x):
        _, mean, var = self.run(x, True)
        self.held = {**self.held, "bn/input_mean": mean, "bn/input_var": var}

    def evaluate(self, x):
        return self.run(x, False)[0]


LAYERS = {
    "torch": Torch,
    "numpy": Numpy,
    "keras": Keras,
    "flax": Flax,
    "nnx": Nnx,
    "haiku": Haiku,
    "equinox": Equinox,
    "equinox-ema": EquinoxEma,
    "onnx": Onnx,
}


def import_keras():
    """Keras, on PyTorch unless the environment says otherwise."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("keras")


def keras_numpy(values):
    """An array of Keras as one of NumPy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's tensors in NumPy 2
        return import_keras().ops.convert_to_numpy(values)


def _like(fresh, arrays):
    """`arrays` as JAX, if they have the structure, shapes and types of `fresh`, or float64."""
    jax = pytest.importorskip("jax")

    def checked(old, new):
        assert old.shape == new.shape
        assert new.dtype in (old.dtype, np.float64)
        return jax.numpy.asarray(new, old.dtype)

    return jax.tree.map(checked, fresh, arrays)
