"""Files of weights: torch's and safetensors' own readers and writers agree with ours."""

import builtins
import errno
import json
import struct
import tarfile

import numpy as np
import pytest
import safetensors.numpy
import torch

from jaxcifar import weight_files
from jaxcifar.errors import UserError

ARRAYS = {
    "conv.weight": np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32),
    "bn.num_batches_tracked": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float32),
    "half": np.arange(3, dtype=np.float16),
    "flags": np.array([True, False, True]),
    "double": np.arange(6, dtype=np.float64).reshape(2, 3).T,  # not contiguous
}


def assert_same(actual, expected):
    assert set(actual) == set(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype and actual[key].shape == value.shape, key
        np.testing.assert_array_equal(actual[key], value, err_msg=key)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.safetensors"])
def test_what_is_saved_is_loaded(name, tmp_path):
    weight_files.save_file(tmp_path / name, ARRAYS)
    assert_same(weight_files.load_file(tmp_path / name), ARRAYS)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_the_safetensors_library_reads_what_we_write_and_we_what_it_writes(tmp_path):
    weight_files.save_file(tmp_path / "ours.safetensors", ARRAYS)
    assert_same(safetensors.numpy.load_file(tmp_path / "ours.safetensors"), ARRAYS)
    contiguous = {key: np.array(value, order="C") for key, value in ARRAYS.items()}
    safetensors.numpy.save_file(contiguous, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert_same(weight_files.load_file(tmp_path / "theirs.safetensors"), ARRAYS)


def safetensors_bytes(entries, data, tail=b""):
    header = json.dumps(entries).encode() + tail
    return struct.pack("<Q", len(header)) + header + data


def test_a_safetensors_file_as_the_format_describes_it(tmp_path):
    """Bytes written by hand: header length, header, data; bfloat16 and an odd offset."""
    path = tmp_path / "w.safetensors"
    bits = torch.tensor([1.5, -3e38, 1e-40]).bfloat16()
    entries = {"__metadata__": {"format": "pt"},
               "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
               "b": {"dtype": "F32", "shape": [2, 1], "data_offsets": [1, 9]},
               "c": {"dtype": "BF16", "shape": [3], "data_offsets": [9, 15]}}
    data = b"\x05" + struct.pack("<2f", 1.5, -2.5) + bits.view(torch.int16).numpy().tobytes()
    path.write_bytes(safetensors_bytes(entries, data, b"   "))
    assert_same(weight_files.load_file(path), {
        "a": np.array([5], np.uint8), "b": np.array([[1.5], [-2.5]], np.float32),
        "c": bits.float().numpy()})


def test_the_bytes_that_we_write_are_the_formats(tmp_path):
    path = tmp_path / "w.safetensors"
    weight_files.save_file(path, ARRAYS)
    content = path.read_bytes()
    length, = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8:8 + length]), content[8 + length:]
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert spans[0][0] == 0 and spans[-1][1] == len(data)  # no holes, as its readers demand
    assert all(a[1] == b[0] for a, b in zip(spans, spans[1:]))
    entry = header["conv.weight"]
    assert entry["dtype"] == "F32" and entry["shape"] == [4, 3, 3, 3]
    assert data[slice(*entry["data_offsets"])] == ARRAYS["conv.weight"].tobytes()
    assert all(header[k]["data_offsets"][0] % v.itemsize == 0 for k, v in ARRAYS.items())


@pytest.mark.parametrize("wrap", [
    lambda s: s,
    lambda s: {"net": s, "acc": 93.0, "epoch": 3},
    lambda s: {"state_dict": s, "optimizer": {"state": {}}},
    lambda s: {"model": {"state_dict": s}},
    lambda s: {"net": {"module." + k: v for k, v in s.items()}},
    lambda s: {"module._orig_mod." + k: v for k, v in s.items()},
    lambda s: {"_orig_mod.module." + k: v for k, v in s.items()},
    lambda s: {"n_averaged": torch.tensor(3), **{"module." + k: v for k, v in s.items()}},
    lambda s: {"state_dict": {"model." + k: v for k, v in s.items()}},
])
def test_the_state_dict_in_a_checkpoint_is_found(wrap, tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    expected = {key: value.numpy() for key, value in model.state_dict().items()}
    for name in ("w.pth", "model_best.pth.tar", "last.ckpt", "pytorch_model.bin"):
        torch.save(wrap(model.state_dict()), tmp_path / name)
        assert_same(weight_files.load_file(tmp_path / name), expected)


def test_parameters_and_bfloat16_of_torch(tmp_path):
    values = {"a": torch.nn.Parameter(torch.ones(2)), "b": torch.tensor([0.1]).bfloat16()}
    torch.save(values, tmp_path / "w.pt")
    assert_same(weight_files.load_file(tmp_path / "w.pt"), {
        "a": np.ones(2, np.float32), "b": values["b"].float().numpy()})


def test_safetensors_needs_no_torch(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_torch(name, *arguments, **keywords):
        if name.partition(".")[0] in ("torch", "safetensors"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)
    monkeypatch.setattr(builtins, "__import__", without_torch)
    weight_files.save_file(tmp_path / "w.safetensors", ARRAYS)
    assert_same(weight_files.load_file(tmp_path / "w.safetensors"), ARRAYS)
    (tmp_path / "w.pth").write_bytes(b"")
    with pytest.raises(UserError, match="without PyTorch: pip install torch, or use a .safe"):
        weight_files.load_file(tmp_path / "w.pth")
    with pytest.raises(UserError, match="cannot write a .pt or .pth file without PyTorch"):
        weight_files.save_file(tmp_path / "v.pt", ARRAYS)


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    for name in ("w.safetensors", "w.pth"):
        weight_files.save_file(tmp_path / name, ARRAYS)
        with monkeypatch.context() as patch, pytest.raises(
                UserError, match=f"cannot read .*{name}: Permission denied"):
            patch.setattr("pathlib.Path.open", denied)
            weight_files.load_file(tmp_path / name)


def denied(*args, **kwargs):
    raise PermissionError(errno.EACCES, "Permission denied")


class Custom:
    """A class that only unpickling would bring back."""


def torch_file(value):
    def write(path):
        torch.save(value, path)
    return write


def cut(name, share):
    """The first part of a good file."""
    def write(path):
        weight_files.save_file(path.with_name(name), ARRAYS)
        content = path.with_name(name).read_bytes()
        path.write_bytes(content[:int(len(content) * share)])
    return write


def tar_archive(path):
    with tarfile.open(path, "w") as tar:
        tar.add(__file__, "w.pth")


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(("name", "write", "message"), [
    ("w.npz", lambda path: path.write_bytes(b"1"), "is not a file of weights: expected a name"),
    ("w.tar", lambda path: path.write_bytes(b"1"), "is damaged"),
    ("w.tar", tar_archive, "is a tar archive, or in a format of PyTorch before 0.2: unpack it"),
    ("w.pth", lambda path: None, "no file .*w.pth"),
    ("w.pth", lambda path: path.write_bytes(b""), "is damaged"),
    ("w.pth", lambda path: path.write_bytes(b"not a checkpoint at all"), "is damaged"),
    ("w.pth", cut("good.pth", 0.5), "is damaged"),
    ("w.pth", torch_file({"net": Custom()}), "holds more than weights"),
    ("w.pth", torch_file(torch.nn.Linear(2, 2)), "holds more than weights"),
    ("w.pth", torch_file([torch.zeros(2)]), "holds no state_dict but a list"),
    ("w.pth", torch_file({"epoch": 3}), "'epoch' is a int, not a tensor"),
    ("w.pth", torch_file({}), "holds no tensors"),
    ("w.pth", torch_file({0: torch.ones(2)}), "0 is a Tensor, not a tensor with a name"),
    ("w.pth", torch_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}), "a as torch.float8_e4m3fn"),
    ("w.pth", torch_file({"a": torch.eye(2).to_sparse()}), "a as .*sparse.*: save it dense"),
    ("w.safetensors", lambda path: path.write_bytes(b""), "is damaged"),
    ("w.safetensors", cut("good.safetensors", 0.1), "is damaged"),
    ("w.safetensors", cut("good.safetensors", 0.9), "is damaged .it is cut short"),
    ("w.safetensors", lambda p: p.write_bytes(b"\xff" * 8 + b"{}"), "shorter than its header"),
    ("w.safetensors", lambda p: p.write_bytes(safetensors_bytes([1], b"")), "is damaged"),
    ("w.safetensors", lambda p: p.write_bytes(safetensors_bytes({"a": 3}, b"")), "is damaged"),
    ("w.safetensors", lambda p: p.write_bytes(safetensors_bytes({"a": GOOD | {"dtype": "F8_E4M3"}},
                                                          b"\0" * 8)), "dtype F8_E4M3"),
    ("w.safetensors", lambda p: p.write_bytes(safetensors_bytes({"a": GOOD | {"shape": [3]}},
                                                          b"\0" * 8)), "its header is wrong"),
    ("w.safetensors", lambda p: p.write_bytes(safetensors_bytes({}, b"")), "holds no tensors"),
])
def test_files_that_cannot_be_read_are_reported_in_one_line(name, write, message, tmp_path):
    write(tmp_path / name)
    with pytest.raises(UserError, match=message) as raised:
        weight_files.load_file(tmp_path / name)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_files_that_cannot_be_written_are_reported(tmp_path):
    with pytest.raises(UserError, match="there is no folder .*missing"):
        weight_files.save_file(tmp_path / "missing" / "w.pt", ARRAYS)
    with pytest.raises(UserError, match="expected a name that ends in .pt, .pth, .safetensors"):
        weight_files.save_file(tmp_path / "w.ckpt", ARRAYS)
    with pytest.raises(UserError, match="a has dtype complex64"):
        weight_files.save_file(tmp_path / "w.safetensors", {"a": np.zeros(1, np.complex64)})
    assert not list(tmp_path.iterdir())
