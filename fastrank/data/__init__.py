"""Image data by name, read from what is on disk or in a package (nothing is ever downloaded), and batches of it."""

from fastrank.data._batches import Augment, batches
from fastrank.data._coco import CocoSet, detection_batches
from fastrank.data._load import NAMES, load
from fastrank.data._sets import FolderSet, ImageSet

__all__ = ["NAMES", "Augment", "CocoSet", "FolderSet", "ImageSet", "batches", "detection_batches", "load"]
