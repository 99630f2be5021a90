import subprocess
import sys

from raysweep.encoders.families import FAMILIES, FEATURE_SOURCES, VARIANTS
from raysweep.encoders.transformers_models import make_config


def test_the_table_needs_neither_torch_nor_transformers():
    code = "import raysweep.encoders.families, sys; print({'torch', 'transformers'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_the_types_of_an_experiment_file():
    assert list(FAMILIES) == ["stacked_cnn", "dinov2", "clip", "siglip", "auto"]
    assert {name: family.default_weights for name, family in FAMILIES.items()} == {
        "stacked_cnn": None,
        "dinov2": "facebook/dinov2-base",
        "clip": "openai/clip-vit-base-patch32",
        "siglip": "google/siglip-base-patch16-224",
        "auto": None,
    }
    assert [name for name, family in FAMILIES.items() if not family.has_weights] == ["stacked_cnn"]


def test_feature_sources_are_those_of_every_family_with_weights():
    expected = {source for family in FAMILIES.values() if family.has_weights for source in family.sources}
    assert set(FEATURE_SOURCES) == expected
    assert FEATURE_SOURCES == ("cls", "mean", "cls+mean", "projected", "pooler")


def test_a_model_type_belongs_to_one_family():
    model_types = [model_type for family in FAMILIES.values() for model_type in family.model_types]
    assert len(set(model_types)) == len(model_types)


def test_only_parts_hang_on_an_attribute():
    assert FAMILIES["dinov2"].parts == ("cls", "mean")
    assert FAMILIES["auto"].parts == ("pooler", "mean")
    for family in FAMILIES.values():
        assert set(family.only_for) <= set(family.parts)


def test_variants_are_valid_configs_of_their_family():
    for name, values in VARIANTS.items():
        config = make_config(values)
        assert config.hidden_size % config.num_attention_heads == 0, name
    assert {family.default_weights for family in FAMILIES.values()} - {None} <= set(VARIANTS)
