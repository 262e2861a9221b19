"""Features of many images: read by worker processes, computed in batches, written in shards that survive a kill.

list -> workers read -> batches of one size -> optimised copy -> maps or vectors -> shards and their index
"""

from backbone.extraction.request import Request
from backbone.extraction.sources import Named, list_images
from backbone.extraction.stream import Extracted, extract

__all__ = ["Extracted", "Named", "Request", "extract", "list_images"]
