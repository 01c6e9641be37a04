"""Tables: what a file says is what is read, and every file that says nothing usable is refused by name."""

import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pnem.data import read_table
from pnem.data.csv_tables import MISSING
from pnem.data.hdf5_tables import find_table, open_table
from pnem.errors import DataError

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=64)


def csv(folder: Path, text: str) -> Path:
    path = folder / "table.csv"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def hdf5(tmp_path: Path) -> Path:
    path = tmp_path / "tables.h5"
    with h5py.File(path, "w") as file:
        file["group/whole"] = np.arange(6, dtype="int16").reshape(3, 2)
        file["real"] = np.array([[1.0, 2, 3], [4, np.nan, 6]], dtype="float32")
        file["vector"] = np.zeros(3)
        file["image"] = np.zeros((1, 2, 3, 4, 1))
        file["empty"] = np.zeros((0, 2))
        file["text"] = np.array([[b"a", b"b"]])
    return path


class TestCSV:
    @given(arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 4)), elements=FINITE), st.booleans())
    def test_numbers_come_back_exactly(self, tmp_path_factory, values, header) -> None:
        lines = [",".join(f"c{i}" for i in range(values.shape[1]))] if header else []
        lines += [",".join(map(repr, row)) for row in values.tolist()]
        table = read_table(csv(tmp_path_factory.mktemp("csv"), "\n".join(lines)))
        # Older releases of pandas may differ in the last digit.
        np.testing.assert_array_max_ulp(table.values, values, 1)
        assert table.names == tuple(f"{'c' if header else 'x'}{i}" for i in range(values.shape[1]))
        assert table.values.flags.writeable

    @pytest.mark.parametrize(
        ("text", "names"),
        [
            ("a,b\n1,2\n", ("a", "b")),
            ("1,2\n3,4\n", ("x0", "x1")),
            ("1,2\n", ("x0", "x1")),
            ("id,2019\n7,3\n", ("id", "2019")),
            ("a,b\n,\n1,2\n", None),
            ("NA,1\n2,3\n", ("x0", "x1")),
            ("nan\n2\n", None),
            ("\ufeffa,b\n1,2\n", ("a", "b")),
            ("a;b\n1;2\n", ("a", "b")),
            ("a\tb\n1\t2\n", ("a", "b")),
            ('"length, outer",b\n1,2\n', ("length, outer", "b")),
            (" a , b \n 1 , 2 \n", ("a", "b")),
            ("\n\na,b\n\n1,2\n\n", ("a", "b")),
        ],
    )
    def test_the_first_line_names_columns_unless_it_looks_like_data(self, tmp_path, text, names) -> None:
        if names is None:
            with pytest.raises(DataError, match=r"row 0 .* has no value"):
                read_table(csv(tmp_path, text))
        else:
            assert read_table(csv(tmp_path, text)).names == names

    @pytest.mark.parametrize("cell", MISSING)
    def test_missing_values_are_nan(self, tmp_path, cell) -> None:
        table = read_table(csv(tmp_path, f"a,b\n1,{cell}\n{cell},4\n"))
        np.testing.assert_array_equal(table.values, [[1, np.nan], [np.nan, 4]])

    def test_true_and_false_are_1_and_0(self, tmp_path) -> None:
        np.testing.assert_array_equal(
            read_table(csv(tmp_path, "a,b\nTrue,1\n,2\nFalse,3")).values[:, 0], [1, np.nan, 0]
        )

    def test_columns_are_read_in_the_order_asked_for(self, tmp_path) -> None:
        path = csv(tmp_path, "kind,a,b,w\nx,1,2,0\ny,3,4,5\n")
        table = read_table(path, columns=["b", "a"], weight="w")
        np.testing.assert_array_equal(table.values, [[2, 1], [4, 3]])
        assert table.names == ("b", "a")
        np.testing.assert_array_equal(table.weight, [0, 5])
        assert read_table(csv(tmp_path, "a,w\n1,2\n"), weight="w").names == ("a",)

    @pytest.mark.parametrize(
        ("text", "options", "message"),
        [
            ("", {}, "is empty"),
            (" \n\n", {}, "is empty"),
            ("a,b\n", {}, "has no rows below its header"),
            ("a,b\n1,2\n3,x\n4,y\n", {}, "column 'b' holds text, 'x' in row 1 .*--columns"),
            ("a;b\n1;2,5\n", {}, "'2,5' in row 0"),
            ("a,b\n1,2\n3\n", {}, "line 3 has 1 cells, but the first line has 2"),
            ("a,b\n1,2\n3,4,5\n", {}, "line 3 has 3 cells"),
            ("a,b\n1,2,3\n", {}, "line 2 has 3 cells"),
            ("1,2,3\n4,5\n", {}, "line 2 has 2 cells"),
            ('a,b\n"1,2\n3,4\n', {}, "line 3"),
            ("a,b\n1,2\n3,inf\n", {}, "column 'b' is infinite in row 1"),
            ("a,b\n1,2\n1e400,3\n", {}, "column 'a' is infinite in row 1"),
            ("a,b\n1,2\nNA,\n,nan\n", {}, r"row 1 .* has no value in a, b.*2 of 3"),
            ("a,b,a\n1,2,3\n", {}, "two columns called 'a'"),
            (",a\n0,1\n", {}, "column 0 has no name .*--columns a"),
            ("a,b\n1,2\n", {"columns": ["c"]}, "no column 'c': its columns are a, b$"),
            ("1,2\n", {"columns": ["a"]}, r"its columns are x0, x1 \(its first line is not a header\)"),
            ("a,b\n1,2\n", {"columns": []}, "no column of values"),
            ("a,b\n1,2\n", {"columns": ["a", "a"]}, "not all different"),
            ("a,b\n1,2\n", {"columns": ["a"], "weight": "a"}, "weights and values at once"),
            ("a\n1\n", {"weight": "a"}, "no column of values"),
            ("a,w\n1,1\n2,-1\n", {"weight": "w"}, "'w' is -1 in row 1"),
            ("a,w\n1,1\n2,\n", {"weight": "w"}, "'w' has no value in row 1"),
            ("a,w\n1,0\n2,0\n", {"weight": "w"}, "0 in every row"),
            ("a,w\n1,inf\n", {"weight": "w"}, "'w' is infinite in row 0"),
            ("a,b\n1,2\n", {"dataset": "d"}, "not an HDF5 file"),
        ],
    )
    def test_bad_input_is_named(self, tmp_path, text, options, message) -> None:
        with pytest.raises(DataError, match=message):
            read_table(csv(tmp_path, text), **options)

    @pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n", b"PK\x03\x04\x00\x00\n", "é,ü\n1,2".encode("latin-1")])
    def test_what_is_not_text_is_refused(self, tmp_path, content) -> None:
        (tmp_path / "table.csv").write_bytes(content)
        with pytest.raises(DataError, match="neither CSV"):
            read_table(tmp_path / "table.csv")

    def test_missing_files_are_named(self, tmp_path) -> None:
        with pytest.raises(DataError, match=r"no\.csv does not exist"):
            read_table(tmp_path / "no.csv")
        with pytest.raises(DataError, match="is a directory"):
            read_table(tmp_path)


class TestHDF5:
    def test_a_dataset_is_read_by_its_name(self, hdf5) -> None:
        table = read_table(hdf5, dataset="group/whole")
        np.testing.assert_array_equal(table.values, [[0, 1], [2, 3], [4, 5]])
        assert (table.names, table.values.dtype) == (("x0", "x1"), np.float64)
        table = read_table(hdf5, dataset="/real", columns=["x2", "x1"], weight="x0")
        np.testing.assert_array_equal(table.values, [[3, 2], [6, np.nan]])
        np.testing.assert_array_equal(table.weight, [1, 4])

    def test_the_only_table_is_found_whatever_the_files_name(self, tmp_path) -> None:
        with h5py.File(tmp_path / "data.csv", "w") as file:
            file["deep/down/x"] = np.ones((2, 3))
            file["labels"] = np.zeros(2)
        assert read_table(tmp_path / "data.csv").values.shape == (2, 3)

    def test_only_the_shape_is_needed_to_find_a_table(self, tmp_path) -> None:
        with h5py.File(tmp_path / "large.h5", "w") as file:
            file.create_dataset("x", (10**9, 8), "f4", chunks=(1000, 8))
        table = find_table(tmp_path / "large.h5")
        assert (table.name, table.shape, table.dtype) == ("x", (10**9, 8), np.dtype("f4"))
        with open_table(table) as dataset:
            assert dataset[5:7].shape == (2, 8)

    @pytest.mark.parametrize(
        ("dataset", "message"),
        [
            (None, r"several tables: choose one of empty, group/whole, real with --dataset"),
            ("none", r"no dataset 'none': .*group/whole \(3, 2\)"),
            ("group", "no dataset 'group'"),
            ("vector", r"shape \(3,\): give two axes"),
            ("image", "give two axes"),
            ("empty", "is empty"),
            ("text", "dtype"),
        ],
    )
    def test_bad_datasets_are_named(self, hdf5, dataset, message) -> None:
        with pytest.raises(DataError, match=message):
            read_table(hdf5, dataset=dataset)

    def test_a_file_without_tables_lists_what_it_has(self, tmp_path) -> None:
        with h5py.File(tmp_path / "images.h5", "w") as file:
            file["training/features"] = np.zeros((1, 2, 3, 4, 1))
        with pytest.raises(DataError, match=r"no two-dimensional dataset.*training/features \(1, 2, 3, 4, 1\)"):
            read_table(tmp_path / "images.h5")

    def test_damage_and_change_are_reported(self, hdf5, tmp_path) -> None:
        table = find_table(hdf5, "real")
        with h5py.File(hdf5, "a") as file:
            del file["real"]
        with pytest.raises(DataError, match="has changed"), open_table(table):
            pass
        hdf5.write_bytes(hdf5.read_bytes()[:600])
        with pytest.raises(DataError, match="truncated or damaged"):
            read_table(hdf5)
        with pytest.raises(DataError, match="not an HDF5 file"):
            find_table(csv(tmp_path, "1,2"))


def test_a_pipe_is_refused(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(DataError, match="save the data to a file"):
        read_table(path)
