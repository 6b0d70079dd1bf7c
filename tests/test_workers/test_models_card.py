from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ModelError
from schemas.frozen import digest
from schemas.model import ModelCard
from workers.models.card import load_card, resolved, write_card

SHA = "0" * 64
CARD = f"""
schema = 1
name = "lesions"
version = "1.2"
licence = "Apache-2.0"
intended_use = "tests"

[network]
adapter = "monai"
name = "DenseNet"
args = {{ spatial_dims = 2, in_channels = 3, out_channels = 2 }}
weights = "weights/w.safetensors"
sha256 = "{SHA}"

[input]
kind = "slide"
channels = 3
tile = [224, 224]
mpp = 0.5

[output]
kind = "logits"
classes = ["rest", "lesion"]
default_target = "lesion"

[cam]
layer = "class_layers.relu"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "model.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_card_is_loaded_with_its_place(tmp_path: Path) -> None:
    loaded = load_card(str(write(tmp_path, CARD)))
    assert loaded.card.input.tile == (224, 224)
    assert loaded.card.network.args["out_channels"] == 2
    assert loaded.folder == tmp_path
    assert loaded.path == tmp_path / "model.toml"


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("channels = 3\n", "", "input.channels: missing"),
        ("mpp = 0.5", "mmp = 0.5", "input.mmp: unknown key (found 0.5)"),
        ("mpp = 0.5", "", "input: [input] kind 'slide' needs mpp"),
        ("mpp = 0.5", "mpp = -1", "input.mpp: found -1"),
        ('"monai"', '"tensorflow"', "network.adapter: found 'tensorflow'"),
        ("schema = 1", "schema = 2", "schema: found 2"),
        ("tile = [224, 224]", "tile = [224]", "2 sizes of at least 1"),
        (SHA, "abc", "network.sha256: found 'abc'"),
        (
            'default_target = "lesion"',
            'default_target = "tumour"',
            "is none of ['rest', 'lesion', 'predicted', 'all']",
        ),
        ("[cam]", "[cams]", "cam: missing"),
    ],
)
def test_a_wrong_card_names_file_key_and_what_was_found(
    tmp_path: Path, old: str, new: str, complaint: str
) -> None:
    assert old in CARD
    path = write(tmp_path, CARD.replace(old, new))
    with pytest.raises(ModelError) as error:
        load_card(path)
    assert str(path) in error.value.message
    assert complaint in error.value.message


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        CARD.replace("channels = 3\n", "").replace("mpp = 0.5", "mpp = 0").replace("[cam]", "[cams]"),
    )
    with pytest.raises(ModelError) as error:
        load_card(path)
    for key in ("input.channels", "input.mpp", "cam:", "cams"):
        assert key in error.value.message


def test_no_toml_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not valid TOML.*line 2"):
        load_card(write(tmp_path, "schema = 1\nname = ?\n"))
    with pytest.raises(ModelError, match=r"absent\.toml: the model card cannot be read"):
        load_card(tmp_path / "absent.toml")


def test_identity_is_digests_and_arguments_but_never_paths(tmp_path: Path) -> None:
    def identity(text: str) -> str:
        return digest(resolved(load_card(write(tmp_path, text)).card))

    assert identity(CARD.replace("weights/w.safetensors", "elsewhere.pt")) == identity(CARD)
    assert identity(CARD.replace(SHA, "1" * 64)) != identity(CARD)
    assert identity(CARD.replace("out_channels = 2", "out_channels = 3")) != identity(CARD)
    bag = f'\n[bag]\nhead = "abmil"\nweights = "{{}}"\nsha256 = "{SHA}"\nfeatures = 512\n'
    assert identity(CARD + bag.format("a.pt")) == identity(CARD + bag.format("b.pt"))
    assert identity(CARD + bag.format("a.pt")) != identity(CARD)


VALUES = st.recursive(
    st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    args=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), VALUES, max_size=4),
    name=st.text(st.characters(exclude_categories=["Cs"])),
)
def test_written_cards_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory, args: dict[str, Any], name: str
) -> None:
    folder = tmp_path_factory.mktemp("card")
    card = load_card(write(folder, CARD)).card
    card = card.model_copy(update={"name": name, "network": card.network.model_copy(update={"args": args})})
    write_card(folder / "again.toml", card)
    assert load_card(folder / "again.toml").card == card


def test_volume_cards_read_back_equal(tmp_path: Path) -> None:
    card = ModelCard.model_validate(
        {
            "schema": 1, "name": "v", "version": "1", "licence": "CC0", "intended_use": "",
            "network": {"adapter": "factory", "name": "package.module:build"},
            "input": {"kind": "volume", "channels": 1, "tile": [32, 48, 48], "spacing_mm": [3, 1, 1], "window": [-100, 300.5]},
            "output": {"kind": "logit", "classes": ["rim"]},
            "cam": {"layer": "features#1"},
        }
    )  # fmt: skip
    write_card(tmp_path / "model.toml", card)
    assert load_card(tmp_path / "model.toml").card == card
