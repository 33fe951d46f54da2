"""What pyproject.toml cannot say of the build: one wheel serves every Python.

The part in C is a plain library that ctypes loads. It has no interface of Python's, so neither its
file nor the wheel is named after one version of it.
"""

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class PlainLibrary(build_ext):
    """Name the part in C as every Python finds it."""

    def get_ext_filename(self, ext_name: str) -> str:
        """Without the version of Python that builds it."""
        return ext_name.replace(".", "/") + ".so"


class AnyPython(bdist_wheel):
    """A wheel for every Python 3 on one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI, platform."""
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_ext": PlainLibrary, "bdist_wheel": AnyPython})
