"""Image data by name, read from what is on disk or in a package (nothing is ever downloaded), and batches of it."""

from fastrank.data._batches import Augment, batches, span
from fastrank.data._coco import CocoSet, detection_batches
from fastrank.data._load import NAMES, load
from fastrank.data._sets import FolderSet, ImageSet
from fastrank.data._shards import TarSet

__all__ = [
    "NAMES",
    "Augment",
    "CocoSet",
    "FolderSet",
    "ImageSet",
    "TarSet",
    "batches",
    "detection_batches",
    "load",
    "span",
]
