"""What a training step costs here: the benchmark behind ``pnem bench``.

>>> from pnem import bench
>>> report = bench.run("cpu", small=True)  # doctest: +SKIP
>>> report.rows[0].name  # doctest: +SKIP
'matrix product, float32'
"""

from pnem.bench.clock import Spread
from pnem.bench.growth import exponents
from pnem.bench.report import Report, Row
from pnem.bench.suites import PARTS, SUITES, run

__all__ = ["PARTS", "SUITES", "Report", "Row", "Spread", "exponents", "run"]
