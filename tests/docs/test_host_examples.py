"""What a reader is shown runs: the examples, and the worked example of docs/adding_a_host.md."""

import importlib
import re
import runpy
import socket
import sys

import pytest
import torch

from experiments.provenance import ROOT
from tests.helpers.host_builders import HostCase
from tests.tokenmixup import test_hosts

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem != "digits")


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("an example went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n.startswith("timm") else pytest.mark.slow) for n in EXAMPLES],
)
def test_example(name, offline, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    accuracy = float(re.search(r"test accuracy ([\d.]+)", printed)[1])
    assert accuracy > 0.6, printed


def test_there_are_three_examples_and_ten_lines():
    assert EXAMPLES == ["custom_encoder", "hugging_face", "timm_ten_lines"]
    text = (ROOT / "examples" / "timm_ten_lines.py").read_text()
    lines = text.partition("# The ten lines\n")[2].partition("\n\n")[0]
    assert len(lines.splitlines()) == 10


@pytest.fixture(scope="module")
def documented(tmp_path_factory):
    """The files that docs/adding_a_host.md shows, importable by the names that it gives them."""
    folder = tmp_path_factory.mktemp("adding_a_host")
    text = (ROOT / "docs" / "adding_a_host.md").read_text(encoding="utf-8")
    names = []
    for name, code in re.findall(r"```python\n# (\w+)\.py\n(.*?)```", text, flags=re.DOTALL):
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
        names.append(name)
    assert names == ["my_vit", "my_vit_adapter", "use", "test_my_vit"]
    sys.path.insert(0, str(folder))
    yield importlib.import_module("use")
    sys.path.remove(str(folder))


def documented_case():
    my_vit = importlib.import_module("my_vit")

    return HostCase("my_vit", "MyViT", "MyViT", "class", lambda dropout: my_vit.MyViT())


def test_documented_adapter_runs(documented):
    assert documented.model.adapter.family == "MyViT"
    assert documented.logits.shape == documented.out.logits.shape == (4, 7)
    assert documented.out.stats["vtm/layer2/remembered_tokens"] == 6


@pytest.mark.parametrize(
    "check",
    [
        test_hosts.test_layout_and_names,
        test_hosts.test_detach_gives_back_exactly_the_host,
        test_hosts.test_evaluation_is_bit_identical_to_the_host,
        test_hosts.test_saliency_is_that_of_the_explicit_map,
        test_hosts.test_whole_model_against_the_oracle,
        test_hosts.test_every_parameter_gets_a_gradient,
    ],
    ids=lambda check: check.__name__.removeprefix("test_"),
)
def test_documented_adapter_is_right(documented, check):
    check(documented_case())


def test_the_documented_test_finds_an_adapter_that_forgets_the_norm(documented, monkeypatch):
    importlib.import_module("test_my_vit").test_vtm()
    adapter = type(documented.model.adapter)

    def forgets(self, layer, remembered, args, kwargs):
        return (torch.cat((args[0], remembered.tokens), dim=1), *args[1:]), kwargs

    monkeypatch.setattr(adapter, "with_memory", forgets)
    with pytest.raises(AssertionError, match="not close"):
        importlib.import_module("test_my_vit").test_vtm()
