"""Captions: cleaned as LlamaGen's training cleaned them, encoded, and aligned to the right."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from inputs import text_encoder

from vapi_fast.data.captions import clean_caption
from vapi_fast.data.text import TextEncoder
from vapi_fast.runtime.errors import CheckpointError, DataError

CPU = torch.device("cpu")
CLEANED = {  # what the public code makes of them, with Beautiful Soup
    "A Photo of a CAT": "a photo of a cat",
    "<person> at https://a.com/b?c=1 in red": "person at ?c=1 in red",
    "www.shop.example.net/x-1 two dogs": "two dogs",
    "see http://t.co": "see",
    "<b>bold</b> &amp; <!-- no --> plain": "bold plain",
    "<script>var a=1</script>a lamp": "a lamp",
    "<![CDATA[two dogs]]> on grass <![if IE]>": "two dogs on grass",
    "&lt;i&gt;chair&lt;/i&gt;": "chair< i>",
    "caf&eacute; &nosuch; &#233;": "café nosuch é",
    "@nick says hi": "says hi",
    "a 漢字 cup": "a cup",
    "a – b — c": "a - b - c",
    "“two” ‘birds’ «x»": "two\" 'birds' \"x",
    "box from 127.0.0.1": "box from",
    "sunset 12:30 ": "sunset 12:30",
    "line\\none": "line one",
    "#123 #12345 1234567 1234": "1234",
    "img_001.jpg of a cow": "of a cow",
    "wait... what": "wait what",
    "*** SALE *** (now) [x] {y} | a/b \\ c": "sale now x y a b c",
    "end . of": "end of",
    "this-is-my-cute-cat": "this is my cute cat",
    "a_b_c_d_e": "a b c d e",
    "two-tone": "two-tone",
    "jc6640 jc6640vc 6640vc231 a1": "a1",
    "free shipping worldwide free shipping": "",
    "free download free of a font": "of a font",
    "click for more": "",
    "png images of page 12": "of",
    "j2d1a2a": "",
    "10x20 3.5х7 2×4": "",
    "a,b.c": "a, b. c",
    "'quoted text'": "quoted text",
    ".hidden": "",
    "-lead": "lead",
    "trail+": "trail",
    "100%25 caf%C3%A9+bar": "100% café bar",
    "CafÃ©": "cafã",
    "ﬁne ½ cup": "fine cup",
    "🙂 face": "🙂 face",
    "1.5m tall": "1.5m tall",
    "a < b": "a < b",
    '<a href="x">link</a> text': "link text",
    "it's a dog's": "it's a dog's",
    "  many   spaces ": "many spaces",
    "İstanbul": "i̇stanbul",
}


@pytest.mark.parametrize("caption", CLEANED)
def test_captions_are_cleaned(caption: str) -> None:
    assert clean_caption(caption) == CLEANED[caption]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_encoder(tmp_path_factory.mktemp("encoder"))


def test_features_stand_to_the_right(folder: Path) -> None:
    """Each is what its caption gives alone, up to its end sign, behind zeros."""
    captions = ["a red cup", "Two dogs!", "a cat on a red cup on a table"]
    encoder = TextEncoder(folder, CPU)
    features, mask = encoder.encode(captions, 12)
    assert features.shape == (3, 12, encoder.width)
    assert mask.shape == (3, 12)
    for caption, row, used in zip(captions, features, mask, strict=True):
        ids = encoder.tokenizer(clean_caption(caption), return_tensors="pt").input_ids
        states = encoder.model(input_ids=ids).last_hidden_state[0]
        assert used.tolist() == [False] * (12 - len(states)) + [True] * len(states)
        assert torch.allclose(row[used], states, atol=1e-5)
        assert not row[~used].any()
        assert ids[0, -1] == encoder.tokenizer.eos_token_id


def test_long_captions_are_cut(folder: Path) -> None:
    encoder = TextEncoder(folder, CPU)
    features, mask = encoder.encode(["a red cup " * 1000], 7)
    assert mask.all()
    ids = encoder.tokenizer("a red cup a red cup", return_tensors="pt").input_ids
    assert ids.shape == (1, 7)
    assert torch.allclose(features, encoder.model(input_ids=ids).last_hidden_state, atol=1e-5)


def test_a_caption_of_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="a caption has no words, or none that are left when it is cleaned: '漢字'"):
        TextEncoder(folder, CPU).encode(["a cup", "漢字"], 12)


def test_what_is_no_encoder_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(
        CheckpointError, match=f"--text-encoder {tmp_path}: cannot be read .*pass --text-encoder FOLDER"
    ):
        TextEncoder(tmp_path, CPU)


@pytest.mark.parametrize("package", ["transformers", "ftfy"])
def test_missing_packages_are_named(folder: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(DataError, match=f"features needs {package}, not installed here: pip install {package}"):
        TextEncoder(folder, CPU)
