import json
from pathlib import Path

import pytest
import torch

from vapi_fast.runtime import forms
from vapi_fast.runtime.errors import ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of sm_90, on which two things were measured."""
    path = tmp_path / "forms.json"
    path.write_text(json.dumps({"sm_90": {"encoder": "float16", "convolution 128→128 384²": "triton"}}))
    monkeypatch.setattr(forms, "MEASURED", path)
    monkeypatch.setattr(forms, "architecture", lambda device: "sm_90" * (device.type == "cuda"))
    forms.measured.cache_clear()
    yield
    forms.measured.cache_clear()


@pytest.mark.usefixtures("hopper")
def test_what_was_measured_is_taken_where_it_was_measured() -> None:
    assert forms.form("encoder", GPU) == "float16"
    assert forms.form("convolution", GPU, "128→128 384²") == "triton"
    assert forms.form("convolution", GPU, "256→256 96²") == "cudnn"
    assert forms.form("wide-attention", GPU) == "sdpa"
    assert forms.form("encoder", CPU) == "tf32"


@pytest.mark.usefixtures("hopper")
def test_a_process_may_take_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(forms.VARIABLE, "encoder=tf32 convolution=triton")
    assert [forms.form("encoder", device) for device in (GPU, CPU)] == ["tf32", "tf32"]
    assert forms.form("convolution", GPU, "256→256 96²") == "triton"
    with forms.taking(encoder="float16"):
        assert forms.form("encoder", CPU) == "float16"
        with forms.taking(wide_attention="matmul"):
            assert [forms.form(kind, GPU) for kind in ("encoder", "wide-attention")] == ["float16", "matmul"]
    assert forms.form("encoder", CPU) == "tf32"


@pytest.mark.usefixtures("hopper")
def test_what_a_device_takes_can_be_taken_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(forms.VARIABLE, "wide-attention=matmul")
    found = forms.taken("sm_90")
    assert found == {"encoder": "float16", "convolution 128→128 384²": "triton", "wide-attention": "matmul"}
    assert forms.taken("") == forms.taken("sm_80") == {"wide-attention": "matmul"}
    with forms.taking(**found):
        assert forms.form("encoder", CPU) == "float16"
        assert forms.form("convolution", CPU, "128→128 384²") == "triton"
        assert forms.form("convolution", CPU, "256→256 96²") == "cudnn"
    monkeypatch.setenv(forms.VARIABLE, "convolution=cudnn")
    assert forms.taken("sm_90") == {"encoder": "float16", "convolution": "cudnn"}


@pytest.mark.parametrize("text", ["encoder", "encoder=int4", "decoder=tf32"])
def test_an_unknown_form_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(forms.VARIABLE, text)
    with pytest.raises(ConfigError, match=r"there is no .*: choose of attention=installed\|cudnn"):
        forms.form("encoder", CPU)


def test_the_table_names_forms_that_there_are() -> None:
    for architecture, chosen in json.loads(forms.MEASURED.read_text(encoding="utf-8")).items():
        assert architecture.startswith("sm_")
        forms.checked({kind.split()[0]: name for kind, name in chosen.items()})
