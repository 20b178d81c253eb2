"""Files of weights: the arrays that they hold, and the settings of layers where they tell them."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from batchnorm.atomic import check_place, explain_write_errors, replacing
from batchnorm.errors import ArgumentError, BatchNormError
from batchnorm.extras import import_extra, require
from batchnorm.inputs import check_file
from batchnorm.native import is_bfloat16

from .frameworks import FRAMEWORKS, find
from .translation import count_arrays, read

__all__ = ["check_out", "load", "save", "source_of", "target_of"]

#: Arrays by name, and settings by layer.
Loaded = tuple[Mapping[Any, Any], dict[str, dict[str, Any]]]
#: Stands for an array of which only the name matters.
OTHER = np.empty((0, 0))
#: Far above those of real files, far below what fills a memory once it is decompressed.
MOST_CHANNELS, MOST_CONFIG = 1 << 24, 1 << 26


class _Format(NamedTuple):
    """How a kind of file is read and written, and of which frameworks; the first is likeliest."""

    load: Callable[[Path], Loaded]
    save: Callable[[Any, Path], None] | None
    frameworks: tuple[str, ...] = tuple(FRAMEWORKS)


def source_of(path: Path, arrays: Mapping[Any, Any]) -> str:
    """The framework that has batch norms of most of the arrays; the likeliest of equals.

    Raises
    ------
    ArgumentError
        None has, and the kind of file does not tell.
    """
    frameworks = _format_of(path).frameworks
    numbers = {name: count_arrays(arrays, name) for name in frameworks}
    if frameworks == tuple(FRAMEWORKS) and not any(numbers.values()):
        raise ArgumentError(
            f"{path}: no framework names its arrays so. Pass --from: {', '.join(FRAMEWORKS)}."
        )
    return max(frameworks, key=numbers.__getitem__)


def target_of(path: Path) -> str:
    """The framework whose files end so.

    Raises
    ------
    ArgumentError
        Those of all do, or such files are not written.
    """
    frameworks = _format_of(path, writing=True).frameworks
    if frameworks == tuple(FRAMEWORKS):
        raise ArgumentError(
            f"{path}: may hold arrays of any framework. Pass --to: {', '.join(FRAMEWORKS)}."
        )
    return frameworks[0]


def load(path: Path, source: str | None = None) -> Loaded:
    """The arrays in a file, and for each batch norm the settings that the file tells.

    Raises
    ------
    ArgumentError
        It cannot be read, or does not hold arrays of that framework.
    BatchNormError
        A package that reads it is not installed.
    """
    form = _format_of(path, source)
    check_file(path)
    try:
        return form.load(path)
    except BatchNormError as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise type(error)(f"{path}: {error}") from error
    except Exception as error:  # h5py, zipfile, protobuf and msgpack raise all kinds
        why = f"{type(error).__name__}: {error}"
        raise ArgumentError(f"{path}: cannot be read ({why}). Name another file.") from error


def check_out(path: Path, target: str) -> None:
    """Raise if `save` could not write that file, before the work for it begins.

    Raises
    ------
    ArgumentError
        Its kind is not written, or not for this framework; or its folder does not exist.
    """
    if _format_of(path, target, writing=True).save is None:
        raise ArgumentError(
            f"{path}: is not written, since such files hold whole models, and not their batch "
            "norms alone. Write a .npz file and assign its arrays to the layers."
        )
    check_place(path, "a file of weights", "translated.npz")


def save(arrays: Mapping[Any, Any], path: Path, target: str) -> None:
    """Write arrays of a framework, completely or not at all, in place of such a file if it exists.

    Raises
    ------
    ArgumentError
        As `check_out`; the file exists and holds anything but batch norms of that framework; or it
        cannot be written.
    """
    check_out(path, target)
    if path.exists() and not _holds_batch_norms_alone(path, target):
        raise ArgumentError(
            f"{path}: exists, and holds other things than batch norms of {find(target).title}, "
            "which would be lost. Name another file, or remove it."
        )
    write, framework = _format_of(path).save, find(target)
    assert write is not None
    if write is not _save_msgpack:
        # Neither NumPy's files nor its tensors have bfloat16, which float32 holds exactly.
        arrays = {
            framework.separator.join(name): a.astype(np.float32) if is_bfloat16(a.dtype) else a
            for name, a in framework.flatten(arrays).items()
        }
    with explain_write_errors(path), replacing(path) as beside:
        write(arrays, beside)


def _holds_batch_norms_alone(path: Path, framework: str) -> bool:
    try:
        return not read(load(path, framework)[0], framework, momentum=0.5, eps=1)[1]
    except BatchNormError:
        return False


def _format_of(path: Path, framework: str | None = None, *, writing: bool = False) -> _Format:
    forms = [form for suffix, form in FORMATS.items() if path.name.lower().endswith(suffix)]
    if not forms:
        known = [suffix for suffix, form in FORMATS.items() if form.save or not writing]
        remedy = "Name it so" if writing else "Save the weights in such a file"
        raise ArgumentError(f"{path}: must end in {', '.join(known)}. {remedy}.")
    form = forms[0]
    if framework is not None and find(framework) and framework not in form.frameworks:
        raise ArgumentError(
            f"{path}: is a file of {' or '.join(form.frameworks)}, not of {framework}. Files that "
            "end in .npz or .safetensors hold arrays of any framework."
        )
    return form


# ---- PyTorch, safetensors, NumPy ----------------------------------------------------------------


def _load_torch(path: Path) -> Loaded:
    import_extra("torch", "torch", "PyTorch's files")
    from batchnorm.torch.targets import load_weights

    arrays: dict[str, Any] = {}
    for name, tensor in load_weights(path).items():
        if tensor.ndim < 2:  # NumPy has no bfloat16
            wide = tensor.float() if tensor.dtype.itemsize < 4 else tensor
            arrays[name] = wide.detach().numpy()
        else:
            arrays[name] = OTHER
    return arrays, {}


def _save_torch(arrays: Any, path: Path) -> None:
    torch = import_extra("torch", "torch", "PyTorch's files")
    content = io.BytesIO()  # torch and safetensors raise errors of their own if a disk is full
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, content)
    path.write_bytes(content.getbuffer())


def _load_safetensors(path: Path) -> Loaded:
    arrays: dict[str, Any] = {}
    with import_extra("safetensors", "torch", ".safetensors files").safe_open(
        path, "numpy"
    ) as file:
        for name in file.keys():  # noqa: SIM118  # it is no dict
            tensor = file.get_slice(name)
            kind = tensor.get_dtype()
            if not _is_small(tensor.get_shape()):
                arrays[name] = OTHER
            elif kind.startswith("F") and kind not in ("F64", "F32", "F16"):
                # NumPy has no type for it, and read refuses this one if it is of a batch norm.
                arrays[name] = np.zeros(tensor.get_shape(), [(kind, "V1")])
            else:
                if kind == "BF16":
                    import_extra("ml_dtypes", "data", "Arrays of bfloat16")
                arrays[name] = file.get_tensor(name)
    return arrays, {}


def _save_safetensors(arrays: Any, path: Path) -> None:
    path.write_bytes(import_extra("safetensors.numpy", "torch", ".safetensors files").save(arrays))


def _load_npz(path: Path) -> Loaded:
    """Read the arrays that may be statistics; of others the names are enough."""
    arrays: dict[str, Any] = {}
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        for member in archive.zip.namelist():
            if not member.endswith(".npy"):
                arrays[member] = OTHER
                continue
            name = member.removesuffix(".npy")
            with archive.zip.open(member) as head:
                first = np.lib.format.read_magic(head) == (1, 0)
                form = np.lib.format
                read_header = form.read_array_header_1_0 if first else form.read_array_header_2_0
                shape, _, _ = read_header(head)
            arrays[name] = _with_bfloat16(archive[name]) if _is_small(shape) else OTHER
    return arrays, {}


def _is_small(shape: tuple[int, ...]) -> bool:
    """Whether an array may be of a batch norm; others need not be read, and may be of any size."""
    return sum(length != 1 for length in shape) <= 1 and math.prod(shape) <= MOST_CHANNELS


def _with_bfloat16(values: Any) -> Any:
    """An array whose type NumPy and HDF5 have written as two bytes without a meaning."""
    if values.dtype != np.dtype("V2"):
        return values
    return values.view(import_extra("ml_dtypes", "data", "Arrays of bfloat16").bfloat16)


def _save_npz(arrays: Any, path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


# ---- Flax ---------------------------------------------------------------------------------------

#: Codes of flax.serialization for an array and a scalar: shape, type and bytes, packed again.
ARRAY, SCALAR = 1, 3


def _load_msgpack(path: Path) -> Loaded:
    msgpack = import_extra("msgpack", "interop", "Flax's .msgpack files")

    def unpack(code: int, packed: bytes) -> Any:
        if code not in (ARRAY, SCALAR):
            return None
        shape, name, values = msgpack.unpackb(packed)
        if name == "bfloat16":
            import_extra("ml_dtypes", "data", "Arrays of bfloat16")
        return np.frombuffer(values, np.dtype(name)).reshape(shape)

    found = msgpack.unpackb(path.read_bytes(), ext_hook=unpack, strict_map_key=False)
    if not isinstance(found, dict):
        raise ArgumentError(f"{path}: must hold a dict of variables, got {type(found).__name__}.")
    return found, {}


def _save_msgpack(arrays: Any, path: Path) -> None:
    msgpack = import_extra("msgpack", "interop", "Flax's .msgpack files")

    def pack(array: Any) -> Any:
        values = (array.shape, array.dtype.name, array.tobytes())
        return msgpack.ExtType(ARRAY, msgpack.packb(values))

    path.write_bytes(msgpack.packb(arrays, default=pack))


# ---- Keras --------------------------------------------------------------------------------------


def _load_keras(path: Path) -> Loaded:
    """Read a whole model, whose configuration tells how its batch norms are built."""
    with zipfile.ZipFile(path) as archive:
        if (size := archive.getinfo("config.json").file_size) > MOST_CONFIG:
            raise ArgumentError(
                f"{path}: config.json must have at most {MOST_CONFIG} bytes, got {size}. Is it a "
                "file of Keras?"
            )
        config = json.loads(archive.read("config.json"))
        weights = io.BytesIO(archive.read("model.weights.h5"))
    return _load_keras_weights(weights, dict(_keras_configs(config)))


def _keras_configs(tree: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        if tree.get("class_name") == "BatchNormalization":
            yield tree["config"]["name"], tree["config"]
        tree = list(tree.values())
    if isinstance(tree, list):
        for below in tree:
            yield from _keras_configs(below)


def _load_keras_weights(file: Any, configs: Mapping[str, Any] | None = None) -> Loaded:
    """Give arrays the names of Keras's variables; the file only numbers them."""
    h5py = import_extra("h5py", "hdf5", "Keras's files")
    arrays: dict[str, Any] = {}
    settings = {}

    def visit(place: str, group: Any) -> None:
        *above, last = place.split("/")
        if last != "vars" or not len(group):
            return
        if configs and "name" not in group.attrs:
            raise ArgumentError(
                f"{'/'.join(above)}: has no name, as in files of Keras before 3.6, so it cannot be "
                "found in the configuration. Save the model with a newer one."
            )
        name = str(group.attrs.get("name", above[-1] if above else ""))
        config = (configs or {}).get(name)
        if config is None:
            # A name that Keras gives is all that tells a batch norm then.
            names = [name, *above[-1:]]
            if not any(re.fullmatch(r"batch_normalization(_\d+)?", n) for n in names):
                arrays.update({f"{name}/{key}": OTHER for key in group})
                return
            if len(group) != 4:
                raise ArgumentError(
                    f"{name}: has {len(group)} arrays, so gamma cannot be told from beta. Save "
                    "the whole model as .keras, whose configuration tells."
                )
        else:
            settings[name] = {"momentum": config["momentum"], "eps": config["epsilon"]}
            settings[name]["channel_axis"] = config["axis"]
        if f"{name}/moving_mean" in arrays:
            raise ArgumentError(f"two layers are called {name!r}. Rename one in Keras.")
        config = config or {"scale": True, "center": True}
        roles = ["gamma"] * config["scale"] + ["beta"] * config["center"]
        roles += ["moving_mean", "moving_variance"]
        roles += ["moving_stddev", "renorm_mean", "renorm_stddev"] * config.get("renorm", False)
        for k, role in enumerate(roles):
            stored = group[str(k)]
            arrays[f"{name}/{role}"] = (
                _with_bfloat16(stored[()]) if _is_small(stored.shape) else OTHER
            )

    with h5py.File(file, "r") as opened:
        opened.visititems(visit)
    return arrays, settings


# ---- ONNX ---------------------------------------------------------------------------------------


def _load_onnx(path: Path) -> Loaded:
    """Read the constants and attributes of each BatchNormalization."""
    require("An ONNX file", "onnx", "onnx")
    from batchnorm.onnx.files import Data, read_model
    from batchnorm.onnx.graphs import Graphs, Refused, attributes

    graphs = Graphs(read_model(path), Data(path.parent).read)
    arrays: dict[str, Any] = {}
    settings: dict[str, dict[str, Any]] = {}
    given_names = {node.name for _, node in graphs.norms()}
    for scope, node in graphs.norms():
        # PyTorch's exporters keep the names of arrays, which say more than those of nodes.
        end = ".running_mean"
        kept = [name.removesuffix(end) for name in node.input if name.endswith(end)]
        others = (f"BatchNormalization_{k}" for k in itertools.count(len(settings)))
        free = (name for name in others if name not in given_names)
        names = itertools.chain(kept, filter(None, [node.name]), free)
        name = next(name for name in names if name not in settings)
        try:
            values = graphs.parameters(scope, node)
            if any(each.ndim != 1 for each in values):
                raise Refused(f"they have shapes {', '.join(str(v.shape) for v in values)}")
        except Refused as reason:
            raise ArgumentError(
                f"{name}: must have constants with one value per channel, but {reason}. Such "
                "batch norms cannot be carried."
            ) from reason
        for role, each in zip(("scale", "B", "input_mean", "input_var"), values, strict=True):
            arrays[f"{name}/{role}"] = each
        # The shortest decimals that are the same float32 are what was meant.
        given = attributes(node)
        settings[name] = {
            "momentum": float(str(np.float32(given.get("momentum", 0.9)))),
            "eps": float(str(np.float32(given.get("epsilon", 1e-5)))),
        }
    for scope in graphs.scopes:
        for name in scope.initializers:
            uses = scope.uses.get(name, [])
            if not all(graphs.is_op(u.node, "BatchNormalization", "Identity") for u in uses):
                arrays.setdefault(name, OTHER)
    return arrays, settings


FORMATS = {
    ".pt": _Format(_load_torch, _save_torch, ("torch",)),
    ".pth": _Format(_load_torch, _save_torch, ("torch",)),
    ".safetensors": _Format(_load_safetensors, _save_safetensors),
    ".npz": _Format(_load_npz, _save_npz),
    ".msgpack": _Format(_load_msgpack, _save_msgpack, ("flax", "nnx")),
    ".keras": _Format(_load_keras, None, ("keras",)),
    ".weights.h5": _Format(_load_keras_weights, None, ("keras",)),
    ".onnx": _Format(_load_onnx, None, ("onnx",)),
}
