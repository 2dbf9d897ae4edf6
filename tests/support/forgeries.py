"""Files made to do harm when they are read: pickles that would run code, archives that would write elsewhere."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import runpy
import subprocess
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BOMB = 2**26  # bytes that a few kilobytes unpack to


class _Call:
    """Unpickling this calls `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def _archive(code: bytes, *, storage: bytes = b"\0" * 16, compress: int = zipfile.ZIP_STORED) -> bytes:
    """An archive as `torch.save` writes it, around a pickle of our own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compress) as archive:
        for name, content in (("data.pkl", code), ("byteorder", b"little"), ("version", b"3\n"), ("data/0", storage)):
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def _text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def _tensor(size: int, stride: int) -> bytes:
    """Pickle code of a tensor whose storage has 4 floats, whatever its size says."""
    storage = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + b"K\x04tQ"
    sizes = b"\x8a\x08" + size.to_bytes(8, "little") + b"\x85" + b"K" + bytes([stride]) + b"\x85"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + sizes + b"\x89ccollections\nOrderedDict\n)RtR"


def _shell(canary: Path) -> str:
    return f"mkdir {canary}"


def _python(canary: Path) -> str:
    return f"__import__('os').mkdir({str(canary)!r})"


def _script(canary: Path) -> str:
    path = canary.with_suffix(".py")
    path.write_text(_python(canary))
    return str(path)


def _system(canary: Path) -> bytes:
    """Call what is on the stack with a shell command."""
    return _text(_shell(canary)) + b"\x85R."


def _scripted(_: Path) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def _itself(_: Path) -> bytes:
    endless: list[Any] = []
    endless.append(endless)
    return _saved({"step": endless})


# Forged checkpoints by name; the dangerous ones would create the folder that they are given.
PICKLES: dict[str, Callable[[Path], bytes]] = {
    "os.system as torch.save writes it": lambda c: _saved({"step": _Call(os.system, _shell(c))}),
    "os.system in the format before archives": lambda c: _saved(
        {"step": _Call(os.system, _shell(c))}, _use_new_zipfile_serialization=False
    ),
    "os.system in a bare pickle": lambda c: pickle.dumps({"step": _Call(os.system, _shell(c))}, protocol=2),
    "builtins.exec": lambda c: _saved({"step": _Call(exec, _python(c))}),
    "builtins.eval": lambda c: _saved({"step": _Call(eval, _python(c))}),  # noqa: S307
    "builtins.getattr": lambda c: _archive(b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\n" + _text("x") + b"\x86R."),
    "subprocess": lambda c: _saved({"step": _Call(subprocess.check_call, _shell(c).split())}),
    "runpy": lambda c: _saved({"step": _Call(runpy.run_path, _script(c))}),
    "a dotted name of a module of torch": lambda c: _archive(b"\x80\x04ctorch.serialization\nos.system\n" + _system(c)),
    "STACK_GLOBAL": lambda c: _archive(b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + _system(c)),
    "INST": lambda c: _archive(b"\x80\x02(" + _text(_shell(c)) + b"iposix\nsystem\n."),
    "OBJ": lambda c: _archive(b"\x80\x02(cposix\nsystem\n" + _text(_shell(c)) + b"o."),
    "EXT1": lambda _: _archive(b"\x80\x02\x82\x01."),
    "BUILD on a module": lambda _: _archive(
        b"\x80\x02ctorch.nn.modules.linear\nIdentity\n)\x81}" + _text("a") + b"K\x01sb."
    ),
    "SETITEM on a tensor": lambda _: _archive(b"\x80\x02" + _tensor(4, 1) + b"K\x00K\x01s."),
    "more elements than storage": lambda _: _archive(b"\x80\x02}" + _text("step") + _tensor(10**9, 1) + b"s."),
    "a terabyte of stride 0": lambda _: _archive(b"\x80\x02}" + _text("step") + _tensor(2**40, 0) + b"s."),
    "a list that holds itself": _itself,
    "a string of 2^62 bytes": lambda _: _archive(b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"x."),
    "a TorchScript archive": _scripted,
    "a tar, torch's first format": lambda c: _tar({"sys_info": b"(dp0\n.", "pickle": b"cposix\nsystem\n" + _system(c)}),
    "an archive that unpacks to all of the memory": lambda _: _archive(
        b"\x80\x02}.", storage=bytes(BOMB), compress=zipfile.ZIP_DEFLATED
    ),
}


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _entry(name: str, kind: bytes = tarfile.REGTYPE, **attributes: Any) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type = kind
    for attribute, value in attributes.items():
        setattr(made, attribute, value)
    return made


def _gz(*entries: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", errors="surrogateescape") as archive:
        for member in entries:
            archive.addfile(member)
    return gzip.compress(buffer.getvalue(), 1, mtime=0)


def _link(outside: Path) -> tarfile.TarInfo:
    return _entry("cifar-10-batches-py", tarfile.SYMTYPE, linkname=str(outside))


# Forged .tar.gz files by name, which would write into the folder that they are given, or never end.
ARCHIVES: dict[str, Callable[[Path], bytes]] = {
    "..": lambda o: _gz(_entry(f"../{o.name}/canary")),
    "an absolute name": lambda o: _gz(_entry(f"{o}/canary")),
    "a symbolic link": lambda o: _gz(_link(o)),
    "a file through a symbolic link": lambda o: _gz(_link(o), _entry("cifar-10-batches-py/canary")),
    "a hard link": lambda o: _gz(_entry("canary", tarfile.LNKTYPE, linkname=f"{o}/canary")),
    "a device": lambda _: _gz(_entry("null", tarfile.CHRTYPE, devmajor=1, devminor=3)),
    "a named pipe": lambda _: _gz(_entry("cifar-10-batches-py/data_batch_1", tarfile.FIFOTYPE)),
    "a setuid program": lambda _: _gz(_entry("sh", mode=0o4755)),
    "a name twice": lambda _: _gz(_entry("canary"), _entry("canary")),
    "names that differ by case": lambda _: _gz(_entry("canary"), _entry("CANARY")),
    "a name that is no UTF-8": lambda _: _gz(_entry("canary\udcff")),
    "2,000 members": lambda _: _gz(*(_entry(f"member{number}") for number in range(2000))),
    "an end too soon": lambda o: _gz(_link(o))[:60],
    "an archive that unpacks to all of the disk": lambda _: gzip.compress(bytes(BOMB), 1, mtime=0),
}
