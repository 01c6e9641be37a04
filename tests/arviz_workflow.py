"""What users do with ArviZ, as a program of its own that needs no torch: for whichever version of ArviZ runs it.

It reads netCDF files, builds the same data again from their arrays, takes them through ArviZ with warnings as errors,
saves and reloads them, and prints the numbers as JSON. All but the last are of the same images, and compared:

    python arviz_workflow.py .../pnem/diagnostics/inference_data.py one.nc two.nc other.nc
"""

import importlib.util
import json
import sys
import tempfile
import warnings
from pathlib import Path


def module_at(path):
    spec = importlib.util.spec_from_file_location("inference_data", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contents(data):
    """The datasets of all groups, by name."""
    names = data.groups() if callable(data.groups) else data.children
    return {name: data[name] if callable(data.groups) else data[name].to_dataset() for name in names}


def rebuilt(inference_data, data):
    datasets = contents(data)
    groups = {
        name: {str(key): (value.dims, value.values, value.attrs) for key, value in dataset.data_vars.items()}
        for name, dataset in datasets.items()
    }
    iterations = datasets["iterations"].coords["iteration"].values if "iterations" in datasets else None
    coords = {} if iterations is None else {"iteration": iterations}
    return inference_data(groups, coords=coords, attrs=data.attrs)


def assert_same(first, second):
    import xarray

    datasets, others = contents(first), contents(second)
    assert set(datasets) == set(others)
    for name, dataset in datasets.items():
        xarray.testing.assert_identical(dataset, others[name])
        assert {key: value.dtype for key, value in dataset.items()} == {k: v.dtype for k, v in others[name].items()}


def workflow(adapter, paths, folder):
    az = adapter.load_arviz()
    import matplotlib.pyplot as plt

    found = {}
    for path in paths:
        name, data = path.stem, az.from_netcdf(path)
        found[name] = rebuilt(adapter.inference_data, data)
        assert type(found[name]) is type(data)
        assert_same(found[name], data)
        found[name].to_netcdf(folder / f"{name}.nc")
        assert_same(az.from_netcdf(folder / f"{name}.nc"), data)
    results = {"version": az.__version__, "type": type(data).__name__}
    for name, data in found.items():
        table, loo = az.summary(data), az.loo(data, pointwise=True)
        results[name] = {
            "rows": list(table.index),
            "r_hat": table["r_hat"].astype(float).max(),
            "elpd": float(loo.elpd if hasattr(loo, "elpd") else loo.elpd_loo),
            "k_hat": float(loo.pareto_k.max()),
        }
        plots = [az.plot_trace(data)]
        if hasattr(az, "plot_trace_dist"):
            plots.append(az.plot_trace_dist(data))
        assert all(plot is not None for plot in plots)
        plt.close("all")
    found.popitem()
    results["compare"] = list(az.compare(found).index)
    return results


if __name__ == "__main__":
    import matplotlib

    matplotlib.use("agg")
    warnings.simplefilter("error")
    # Versions of ArviZ below 1 call pandas and Matplotlib in ways that these are about to drop.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"arviz\.")
    program, *files = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(workflow(module_at(program), [Path(file) for file in files], Path(folder))))
