"""Data sets of images, with or without a true grouping of their pixels: read, written, generated; and tables."""

from pnem.data.bouncing_balls import BouncingBalls, bouncing_balls, write_bouncing_balls
from pnem.data.fingerprint import fingerprint
from pnem.data.flying_mnist import FlyingDigits, flying_mnist, write_flying_mnist
from pnem.data.flying_shapes import LabelledSequences, flying_shapes, write_flying_shapes
from pnem.data.hdf5 import MEMORY_LIMIT, Batch, ImageDataset
from pnem.data.mnist import write_mnist
from pnem.data.moving_occluder import OccludedSequences, moving_occluder, write_moving_occluder
from pnem.data.rows import Rows
from pnem.data.shapes import OUTLINES, LabelledImages, static_shapes, write_static_shapes
from pnem.data.tables import Table, open_items, read_table
from pnem.data.writing import write_hdf5

__all__ = [
    "MEMORY_LIMIT",
    "OUTLINES",
    "Batch",
    "BouncingBalls",
    "FlyingDigits",
    "ImageDataset",
    "LabelledImages",
    "LabelledSequences",
    "OccludedSequences",
    "Rows",
    "Table",
    "bouncing_balls",
    "fingerprint",
    "flying_mnist",
    "flying_shapes",
    "moving_occluder",
    "open_items",
    "read_table",
    "static_shapes",
    "write_bouncing_balls",
    "write_flying_mnist",
    "write_flying_shapes",
    "write_hdf5",
    "write_mnist",
    "write_moving_occluder",
    "write_static_shapes",
]
