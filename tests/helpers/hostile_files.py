"""Files that try to run something, claim what they do not hold, or keep a reader waiting."""

import argparse
import builtins
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import torch

from experiments.checkpoint import save_checkpoint

GIB = 1 << 30


class Runs:
    """Calls something while it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def gadgets(trap):
    """What would leave the trap behind, each by another way."""
    code = f"open({str(trap)!r}, 'w')"
    return {
        "os.system": Runs(os.system, f"touch {trap}"),
        "builtins.eval": Runs(builtins.eval, code),
        "builtins.exec": Runs(builtins.exec, code),
        "builtins.open": Runs(builtins.open, str(trap), "w"),
        "torch.load": Runs(torch.load, str(trap)),
    }


class Subclass(torch.nn.Parameter):
    """A parameter that brings a function for its own rebuilding."""

    def __reduce_ex__(self, protocol):
        return self.call


def subclass(gadget):
    value = Subclass(torch.ones(2))
    value.call = gadget.call
    return value


def npz_of(gadget, path):
    with path.open("wb") as file:
        np.savez(file, a=np.array([gadget], dtype=object))


WEIGHTS = {"w": torch.ones(2)}
# what writes a file with a gadget in it, by the place of the gadget
PLACES = {
    "value": lambda gadget, path: torch.save({**WEIGHTS, "x": gadget}, path),
    "key": lambda gadget, path: torch.save({"state_dict": {gadget: torch.ones(1)}}, path),
    "tensor": lambda gadget, path: torch.save({**WEIGHTS, "x": subclass(gadget)}, path),
    "namespace": lambda gadget, path: torch.save(
        {"state_dict": WEIGHTS, "args": argparse.Namespace(lr=1, x=gadget)}, path
    ),
    "legacy": lambda gadget, path: torch.save(
        {"x": gadget}, path, _use_new_zipfile_serialization=False
    ),
    "pickle": lambda gadget, path: path.write_bytes(pickle.dumps({"x": gadget}, protocol=2)),
    "pickle 4": lambda gadget, path: path.write_bytes(pickle.dumps({"x": gadget}, protocol=4)),
    "run": lambda gadget, path: save_checkpoint(path, {"model": WEIGHTS, "config": gadget}),
    "npz": npz_of,
}


def archive(path, members):
    with zipfile.ZipFile(path, "w") as opened:
        for name, content in members:
            opened.writestr(name, content)


def torch_zip(path, program, storage=b"\0" * 16, name="archive"):
    """A file in torch's format around a pickle that was written by hand."""
    members = [("data.pkl", program), ("byteorder", b"little"), ("data/0", storage)]
    members.append(("version", b"3\n"))
    archive(path, [(f"{name}/{part}", content) for part, content in members])


def whole(number):
    """A number as an instruction of a pickle."""
    content = pickle.encode_long(number)
    return b"\x8a" + bytes([len(content)]) + content


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(size, stride, numel=4, offset=0):
    """Instructions that build a tensor over the storage `0` of so many numbers."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    storage += whole(numel) + b"tQ"
    sizes, strides = (b"(" + b"".join(map(whole, s)) + b"t" for s in (size, stride))
    hooks = b"ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + whole(offset)
        + sizes
        + strides
        + (b"\x89" + hooks + b"tR")
    )


def state_dict(*values):
    items = b"".join(text(f"w{n}") + value for n, value in enumerate(values))
    return b"\x80\x02}(" + items + b"u."


def with_tensor(*arguments, **more):
    return lambda path: torch_zip(path, state_dict(tensor(*arguments, **more)))


def huge_storage_of_legacy(path):
    file = io.BytesIO()
    torch.save({"w": torch.ones(4)}, file, _use_new_zipfile_serialization=False)
    # the number of elements, in the storage's persistent id
    content = file.getvalue()
    place = content.index(b"K\x04", content.index(b"cpu"))
    path.write_bytes(content[:place] + whole(1 << 40) + content[place + 2 :])


def nested_archive(path):
    inner = io.BytesIO()
    archive(inner, [("archive/data.pkl", b"\0" * 100)])
    archive(path, [("archive/inner.zip", inner.getvalue())])


def tar(path):
    """A tar that begins like a pickle: torch's oldest format, which it extracts to a folder."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as opened:
        for name in ("\x80\x02K\x01.", "storages", "tensors", "pickle", "../escaped"):
            opened.addfile(tarfile.TarInfo(name), io.BytesIO())


def npy(header):
    text = (repr(header) + "\n").encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


SCALE = npy({"descr": "<f4", "fortran_order": False, "shape": (4,)}) + b"\0" * 16


def npz_claiming(shape, descr="<f4"):
    content = npy({"descr": descr, "fortran_order": False, "shape": shape}) + b"\0" * 64
    return lambda path: archive(
        path, [("embedding/kernel.npy", content), ("Transformer/encoder_norm/scale.npy", SCALE)]
    )


def npz_of_few_dimensions(path):
    with path.open("wb") as file:
        arrays = {"embedding/kernel": np.ones(3), "Transformer/encoder_norm/scale": np.ones(3)}
        np.savez(file, **arrays)


def safetensors(header, data=b"\0" * 16, length=None):
    def write(path):
        content = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", length or len(content)) + content + data)

    return write


def entry(start, end, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


HOSTILE = {
    "terabytes in a storage": with_tensor([4], [1], numel=1 << 40),
    "storage below zero": with_tensor([4], [1], numel=-4),
    "size beyond the storage": with_tensor([1 << 40], [1]),
    "stride of zero": with_tensor([1 << 20, 1 << 20], [0, 0]),
    "offset beyond the storage": with_tensor([4], [1], offset=1 << 40),
    "terabytes in the older format": huge_storage_of_legacy,
    "archive in an archive": nested_archive,
    "tar": tar,
    "npz of absurd shape": npz_claiming((1 << 40, 1 << 20)),
    "npz of long texts": npz_claiming((1,), descr=f"<U{1 << 28}"),
    "npz of objects": npz_claiming((4,), descr="|O"),
    "npz of few dimensions": npz_of_few_dimensions,
    "safetensors with a long header": safetensors(b'{"a":', length=99_999_999),
    "safetensors with a header without end": safetensors(b'{"a":', length=(1 << 64) - 1),
    "safetensors with nested header": safetensors(b'{"a":' * 100_000),
    "safetensors beyond the file": safetensors({"a": entry(0, 1 << 40, (1 << 38,))}),
    "safetensors that overflow": safetensors({"a": entry(0, 16, (1 << 62, 1 << 62))}),
    "safetensors of another shape": safetensors({"a": entry(0, 16, (1 << 20,))}),
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path),
}
