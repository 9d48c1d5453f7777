"""Images: their listing, their pixels, and batches of them."""

from mmfm.data.images import as_rgb, center_crop, crop_generated, read_image
from mmfm.data.listing import Listing, choose_heldout, choose_limited, find_readable, scan, write_listing
from mmfm.data.loader import batches_of_parts, evenly, image_batches, ranges, shards, to_float

__all__ = [
    "Listing",
    "as_rgb",
    "batches_of_parts",
    "center_crop",
    "choose_heldout",
    "choose_limited",
    "crop_generated",
    "evenly",
    "find_readable",
    "image_batches",
    "ranges",
    "read_image",
    "scan",
    "shards",
    "to_float",
    "write_listing",
]
