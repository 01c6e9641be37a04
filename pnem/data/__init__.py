"""Data sets of images with a true grouping of their pixels: read, written and generated; and tables of numbers."""

from pnem.data.hdf5 import MEMORY_LIMIT, Batch, ImageDataset
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
    "Rows",
    "Table",
    "open_items",
    "read_table",
    "static_shapes",
    "write_hdf5",
    "write_static_shapes",
]
