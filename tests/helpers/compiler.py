"""Where there is a C compiler, what set-up builds with it must be there: a missing part fails."""

import shutil

import pytest

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
