"""Features of many images: read by worker processes, computed in batches, written in shards that survive a kill.

list -> workers read -> batches of one size -> optimised copy -> maps or vectors -> shards and their index
"""

from backbone.extraction.formats import ShardFormat
from backbone.extraction.job import write_features
from backbone.extraction.map_batches import FeatureExtractor
from backbone.extraction.reading import VanishedFolderError
from backbone.extraction.request import Request
from backbone.extraction.sources import Named, list_images
from backbone.extraction.stream import Extracted, extract

__all__ = [
    "Extracted",
    "FeatureExtractor",
    "Named",
    "Request",
    "ShardFormat",
    "VanishedFolderError",
    "extract",
    "list_images",
    "write_features",
]
