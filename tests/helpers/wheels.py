"""Wheels for the tests of set-up, made by the standard library alone."""

import zipfile
from pathlib import Path


def write_wheel(
    folder: str | Path, name: str, version: str, code: str = "", script: str = ""
) -> Path:
    """A wheel with one module, and a program where a script is given."""
    path = Path(folder) / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    if script:
        files[f"{name}-{version}.data/scripts/{name}"] = script
    with zipfile.ZipFile(path, "w") as wheel:
        for file, content in files.items():
            entry = zipfile.ZipInfo(file)
            entry.external_attr = 0o100755 << 16  # a file, executable for the script
            wheel.writestr(entry, content)
    return path
