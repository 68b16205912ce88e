"""Files of weights: what torch.save writes, and .safetensors, which needs no other package.

A .safetensors file is the length of its header (8 bytes, little endian), the header (JSON: name ->
dtype, shape, first and last byte), and the arrays. Source: github.com/huggingface/safetensors.
"""

import io
import json
import math
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from jaxcifar import run_folder
from jaxcifar.errors import UserError

SUFFIXES = (".pt", ".pth", ".safetensors")
READABLE = (*SUFFIXES, ".bin", ".ckpt", ".tar")  # as in model_best.pth.tar

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",  # the upper half of an F32
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}
_NAMES = {np.dtype(code): name for name, code in _DTYPES.items() if name != "BF16"}
_WRAPPERS = ("state_dict", "model_state_dict", "net", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, a Lightning module
_COUNTER = "n_averaged"  # torch.optim.swa_utils.AveragedModel's, beside its "module."
_LONGEST_HEADER = 100_000_000


def load_file(path):
    """Read a state_dict, key -> numpy array; arrays of a .safetensors file are read-only views.

    path: a .safetensors file, or another of READABLE, which torch.save wrote (needs torch; nothing
    but tensors and plain values is unpickled). A state_dict inside {"state_dict",
    "model_state_dict", "net" or "model": ...} is taken out; the prefixes "module.", "_orig_mod." and
    "model." of all keys are dropped, and so is AveragedModel's counter. bfloat16 becomes float32.
    Raises UserError: no such file, one that may not be read, another suffix, damaged, no state_dict
    in it, or a tensor that is none of numpy's.
    """
    path = _checked(path, READABLE)
    if not path.is_file():
        raise UserError(f"no file {path}: give the path of a {', '.join(READABLE)} file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    content = _unwrapped(content)
    for key, value in content.items():
        if not hasattr(value, "shape") or not isinstance(key, str):
            raise UserError(f"{path} holds no state_dict: {key!r} is a {type(value).__name__}, not "
                            "a tensor with a name; save model.state_dict()")
    if not content:
        raise UserError(f"{path} holds no tensors: save model.state_dict()")
    return {key: _to_numpy(path, key, value) for key, value in _without_prefixes(content).items()}


def save_file(path, state_dict):
    """Write a state_dict, key -> numpy array, to a .pt, .pth (needs torch) or .safetensors file.

    The file appears whole or not at all. Raises UserError: another suffix, no such folder, a dtype
    that the format does not have, or a file that cannot be written.
    """
    path = check_target(path)
    arrays = {key: np.asarray(value, order="C") for key, value in state_dict.items()}
    encode = _safetensors_bytes if path.suffix == ".safetensors" else _torch_bytes
    run_folder.write_atomic(path, encode(arrays))


def check_target(path):
    """Return a path that `save_file` may write, as a Path; UserError by its suffix or folder."""
    return run_folder.check_target(_checked(path, SUFFIXES))


def _checked(path, suffixes):
    path = pathlib.Path(path)
    if path.suffix not in suffixes:
        raise UserError(f"{path} is not a file of weights: expected a name that ends in "
                        f"{', '.join(suffixes)}")
    return path


def _read_safetensors(path):
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise _damaged(path, "it is shorter than its header says")
        header = file.read(length)
    try:
        entries = dict(json.loads(header))
        entries.pop("__metadata__", None)
        data = np.memmap(path, np.uint8, "r")[8 + length:]
        return {name: _array(data, **entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from error


def _array(data, dtype, shape, data_offsets):
    """Return the array of one header entry; ValueError where it does not fit into the data."""
    if dtype not in _DTYPES:
        raise ValueError(f"it has tensors of dtype {dtype}")
    first, last = data_offsets
    code = np.dtype(_DTYPES[dtype])
    if not 0 <= first <= last <= len(data) or math.prod(shape) * code.itemsize != last - first:
        raise ValueError("it is cut short, or its header is wrong")
    array = data[first:last].view(np.ndarray).view(code).reshape(shape)
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array


def _safetensors_bytes(arrays):
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))  # aligned
    header, first = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        array = arrays[name]
        if array.dtype not in _NAMES:
            raise UserError(f"{name} has dtype {array.dtype}, which .safetensors does not have: "
                            f"convert it to one of {', '.join(map(str, _NAMES))}")
        header[name] = {"dtype": _NAMES[array.dtype], "shape": array.shape,
                        "data_offsets": [first, first + array.nbytes]}
        first += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text,
                     *(arrays[name].tobytes() for name in names)])


def _read_torch(path):
    torch = _import_torch("read", path)
    import pickle
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        if re.search("Unsupported (global|class)|Can only|Trying to|TorchScript", str(error)):
            raise UserError(f"{path} holds more than weights, which may run code when it is read: "
                            "load it where you trust it and save model.state_dict()") from error
        if "legacy .tar" in str(error):
            raise UserError(f"{path} is a tar archive, or in a format of PyTorch before 0.2: unpack it, "
                            "or save model.state_dict() by a newer one") from error
        raise _damaged(path, str(error).strip().partition("\n")[0][:120]) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no state_dict but a {type(content).__name__}: save "
                        "model.state_dict()")
    return content


def _torch_bytes(arrays):
    torch = _import_torch("write", "a .pt or .pth file")
    buffer = io.BytesIO()
    torch.save({key: torch.from_numpy(array.copy()) for key, array in arrays.items()}, buffer)
    return buffer.getvalue()


def _import_torch(verb, what):
    try:
        import torch
    except ImportError as error:
        raise UserError(f"cannot {verb} {what} without PyTorch: pip install torch, or use a "
                        ".safetensors file, which needs nothing") from error
    return torch


def _damaged(path, reason):
    return UserError(f"{path} is damaged ({reason}): get or save it again")


def _unwrapped(content):
    """Return the state_dict of a training script's checkpoint, {"net": ..., "epoch": ...}."""
    inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
    return _unwrapped(inner[0]) if inner else content


def _without_prefixes(state_dict):
    if all(key.startswith("module.") for key in state_dict if key != _COUNTER):
        state_dict = {key: value for key, value in state_dict.items() if key != _COUNTER}
    for prefix in _PREFIXES * 2:  # in either order
        if all(key.startswith(prefix) for key in state_dict):
            state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return state_dict


def _to_numpy(path, key, value):
    if not hasattr(value, "detach"):
        return value
    value = value.detach()
    value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    try:
        return value.numpy()
    except (TypeError, RuntimeError, NotImplementedError) as error:  # float8, sparse, meta
        raise UserError(f"{path} holds {key} as {value.dtype}, {value.layout}, on {value.device}, "
                        "which is not read: save it dense and in float32") from error
