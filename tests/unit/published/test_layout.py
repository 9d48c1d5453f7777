"""Where the published files lie."""

import pytest

from mmfm.published import layout


@pytest.mark.parametrize(
    "place", [layout.decoder, layout.statistics, layout.mixture, layout.spatial_mixture, layout.steps]
)
def test_nothing_is_published_for_other_encoders(place):
    assert place("dinov2")
    with pytest.raises(
        ValueError, match=r"nothing is published for encoders of the family timm, only for dinov2, sigl"
    ):
        place("timm")
    with pytest.raises(ValueError, match=r"unknown encoder family 'dinov3'"):
        place("dinov3")
