"""What a folder says of its model."""

import pytest

from mmfm.infra import store
from mmfm.infra.model_folder import describe, preprocessing


def test_a_nested_configuration_leaves_its_defaults_out():
    """As transformers writes the base models of SigLIP and CLIP."""
    for kind, patch in (("siglip", 16), ("clip", 32)):
        found = describe({"model_type": kind, "vision_config": {"model_type": f"{kind}_vision_model"}})
        assert (found.width, found.depth, found.patch_size("folder")) == (768, 12, patch)
    given = {"model_type": "siglip", "vision_config": {"hidden_size": 1152, "patch_size": 14}}
    assert (describe(given).width, describe(given).patch_size("folder")) == (1152, 14)


def test_timm_without_a_normalisation(tmp_path):
    for more in ({}, {"pretrained_cfg": None}):
        store.write_json(tmp_path / "config.json", {"architecture": "vit_base_patch16_224", **more})
        with pytest.raises(ValueError, match=r"config.json' has no image_mean; fetch the encoder again"):
            preprocessing(tmp_path)
