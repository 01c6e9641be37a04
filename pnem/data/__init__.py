"""Data sets of images, with or without a true grouping of their pixels: read, written, generated; and tables."""

from pnem.data.fingerprint import fingerprint
from pnem.data.flying_shapes import LabelledSequences, flying_shapes, write_flying_shapes
from pnem.data.hdf5 import MEMORY_LIMIT, Batch, ImageDataset
from pnem.data.mnist import write_mnist
from pnem.data.rows import Rows
from pnem.data.shapes import OUTLINES, LabelledImages, static_shapes, write_static_shapes
from pnem.data.tables import Table, open_items, read_table
from pnem.data.writing import write_hdf5

__all__ = [
    "MEMORY_LIMIT",
    "OUTLINES",
    "Batch",
    "ImageDataset",
    "LabelledImages",
    "LabelledSequences",
    "Rows",
    "Table",
    "fingerprint",
    "flying_shapes",
    "open_items",
    "read_table",
    "static_shapes",
    "write_flying_shapes",
    "write_hdf5",
    "write_mnist",
    "write_static_shapes",
]
