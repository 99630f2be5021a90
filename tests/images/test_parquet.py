"""Parquet files that are made to do harm: none of their bytes is run, in the driver or in Ray's tasks."""

import io
import os
import pickle
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raysweep.errors import DataError
from raysweep.experiment.sections import DataConfig
from raysweep.images.cache import Cache, write_manifest
from raysweep.images.cache_files import list_sizes, read_blocks, read_row_ids
from raysweep.images.decode import open_image
from raysweep.images.image_bytes import read_image_bytes
from raysweep.images.index import load_index
from raysweep.images.listing import list_source
from raysweep.images.pixels import open_pixels

NAME = b"ARROW:extension:name"
PICKLED = b"ray.data.arrow_pickled_object"


def png(number: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


class Payload:
    """What makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def payload(tmp_path):
    """Bytes that run code when they are unpickled, and a function that tells whether that has happened."""
    pwned = tmp_path / "pwned"
    return pickle.dumps(Payload(pwned)), pwned.exists


def polyglot(payload: bytes) -> bytes:
    """The head of a GIF to Pillow, code to pickle, which skips the rest of the image as the bytes of a string."""
    frame = b"\0\0" + b",\0\0\0\0\x04\0\x04\0\0" + b"\x02\x02L\x01\0;"
    # To pickle: a number (G and 8 bytes), taken off the stack (0), protocol 2 (0x80), a string (B and its length).
    return b"GIF87a\x04\0\x04" + b"0" + b"\x80\x02" + b"B" + len(frame).to_bytes(4, "little") + frame + payload


def extension(storage: pa.Array) -> pa.Array:
    """The array as the extension type that Ray Data unpickles; importing Ray Data registers it in this process."""
    import ray.data  # noqa: F401

    if isinstance(storage.type, pa.BaseExtensionType):
        return storage
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    return pa.ExtensionArray.from_storage(ArrowPythonObjectType(), storage.cast(pa.large_binary()))


def marked(name, storage):
    """A field as a process that does not know the extension type sees it: plain bytes, with metadata."""
    return pa.field(name, storage.type, metadata={NAME: PICKLED, b"ARROW:extension:metadata": b""})


def evil_columns(bytes_):
    """Every place of a table in which pickled objects can stand, by name."""
    many = [bytes_] * 40
    evil = extension(pa.array(many, pa.large_binary()))
    good = pa.array([png(number) for number in range(40)])
    labels = pa.array(list("ab" * 20))
    structs = pa.StructArray.from_arrays([evil, pa.nulls(40, pa.string())], ["bytes", "path"])
    paths = pa.StructArray.from_arrays([pa.nulls(40, pa.binary()), evil], ["bytes", "path"])
    lists = pa.FixedSizeListArray.from_arrays(evil, 1)
    dictionary = pa.DictionaryArray.from_arrays(pa.array([0] * 40), evil.slice(0, 1))
    return {
        "image": {"image": evil, "label": labels},
        "image.bytes": {"image": structs, "label": labels},
        "image.path": {"image": paths, "label": labels},
        "image list": {"image": lists, "label": labels},
        "label": {"image": good, "label": evil},
        "label list": {"image": good, "label": lists},
        "label struct": {"image": good, "label": structs},
        "split": {"image": good, "label": labels, "split": evil},
        "dotted image": {"image.x": evil, "image": evil, "label": labels},
        "dictionary": {"image": good, "label": dictionary},
    }


PLACES = list(evil_columns(b""))


def write(path, columns):
    """Writes a Parquet file, or None where Arrow cannot write such a column."""
    try:
        pq.write_table(pa.table(columns), path)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        pytest.skip("Arrow writes no such column")
    return path


def test_the_payload_is_real(tmp_path, payload):
    """What the code must not do does run the payload, so that the tests below can fail."""
    bytes_, has_run = payload
    assert open_image(polyglot(bytes_)).format == "GIF"
    path = write(tmp_path / "x.parquet", evil_columns(polyglot(bytes_))["image"])
    pq.read_table(path)["image"][0].as_py()
    assert has_run()


@pytest.mark.parametrize("place", PLACES)
def test_pickled_objects_are_refused_in_every_column_that_is_read(tmp_path, payload, place):
    bytes_, has_run = payload
    path = write(tmp_path / "x.parquet", evil_columns(bytes_)[place])
    with pytest.raises(DataError, match=r"column '[\w.]+' (has the extension type|is )"):
        load_index(DataConfig(source=str(path), max_bad_fraction=1), seed=0)
    assert not has_run()


@pytest.mark.parametrize("place", ["image", "label", "split", "bytes", "path"])
def test_the_mark_of_a_type_that_is_not_known_here_is_refused(tmp_path, payload, place):
    """A driver that has not imported Ray Data sees plain bytes; its workers would see pickled objects."""
    bytes_, has_run = payload
    other = b"unknown.to.this.process"
    pickled = pa.array([polyglot(bytes_)] * 40, pa.large_binary())
    columns = {"image": pa.array([png(n) for n in range(40)]), "label": pa.array(list("ab" * 20))}
    fields = [pa.field(name, column.type) for name, column in columns.items()]
    if place in ("bytes", "path"):
        inner = [pa.field("bytes", pa.large_binary()), pa.field("path", pa.string())]
        number = ("bytes", "path").index(place)
        inner[number] = inner[number].with_metadata({NAME: other})
        columns["image"] = pa.array([{"bytes": polyglot(bytes_), "path": "x"}] * 40, pa.struct(inner))
        fields[0] = pa.field("image", columns["image"].type)
    else:
        columns[place] = pickled
        fields = [field for field in fields if field.name != place]
        fields.append(marked(place, pickled).with_metadata({NAME: other}))
    schema = pa.schema(fields)
    pq.write_table(pa.table([columns[name] for name in schema.names], schema=schema), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"has the extension type 'unknown\.to\.this\.process', .* can run code"):
        load_index(DataConfig(source=str(tmp_path / "x.parquet")), seed=0)
    assert not has_run()


@pytest.mark.parametrize("place", ["image", "image.bytes", "dotted image"])
def test_images_are_checked_again_where_they_are_read(tmp_path, payload, place):
    """The file may have changed since it was listed, and a worker knows more types than the driver."""
    bytes_, has_run = payload
    path = write(tmp_path / "x.parquet", evil_columns(bytes_)[place])
    images = read_image_bytes([str(path)] * 2, [0, 1], [None] * 2, "image")
    assert all(isinstance(image, DataError) and "extension type" in str(image) for image in images)
    assert not has_run()


def test_a_column_beside_the_images_is_not_read_for_them(tmp_path, payload):
    """To Parquet, `image` names `image.x` too."""
    bytes_, has_run = payload
    columns = evil_columns(bytes_)["image"] | {"image": pa.array([png(number) for number in range(40)])}
    path = write(tmp_path / "x.parquet", {"image.x": extension(pa.array([bytes_] * 40, pa.large_binary()))} | columns)
    assert read_image_bytes([str(path)], [7], [None], "image") == [png(7)]
    index = load_index(DataConfig(source=str(path)), seed=0)
    assert index.num_rows_found == 40
    assert not has_run()


@pytest.fixture
def ray_cluster():
    from raysweep.cluster.session import ray_session

    with ray_session(verbose=False):
        yield


@pytest.mark.ray
@pytest.mark.slow
def test_a_task_of_ray_runs_nothing_either(tmp_path, payload, ray_cluster):
    import ray

    bytes_, has_run = payload
    path = write(tmp_path / "x.parquet", evil_columns(polyglot(bytes_))["image"])

    @ray.remote
    def read(path):
        import ray.data  # noqa: F401

        return [str(image) for image in read_image_bytes([path], [0], [None], "image")]

    @ray.remote
    def unpickle(path):
        import ray.data  # noqa: F401

        pq.read_table(path)["image"][0].as_py()

    assert "extension type 'ray.data.arrow_pickled_object'" in ray.get(read.remote(str(path)))[0]
    assert not has_run()
    ray.get(unpickle.remote(str(path)))
    assert has_run()


# Caches, which several people may share


def write_features(folder, columns):
    """A feature cache with one file of these columns."""
    (folder / "a-pass").mkdir(parents=True)
    path = folder / "a-pass" / "rows-000000000000.parquet"
    pq.write_table(pa.table(columns), path)
    write_manifest(folder, Cache(str(folder), str(folder / "a-pass"), 2, (), 1.0, 1, 0, made_now=False))
    return path


@pytest.mark.parametrize("place", ["row_id", "cls", "list of cls"])
def test_a_cache_of_features_runs_nothing(tmp_path, payload, place):
    bytes_, has_run = payload
    evil = extension(pa.array([bytes_] * 2, pa.large_binary()))
    halves = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(2, np.float16)), 1)
    columns = {
        "row_id": {"row_id": evil, "cls": halves},
        "cls": {"row_id": [0, 1], "cls": evil},
        "list of cls": {"row_id": [0, 1], "cls": pa.FixedSizeListArray.from_arrays(evil, 1)},
    }[place]
    path = write_features(tmp_path / "cache", columns)
    with pytest.raises(DataError, match=r"damaged \(column '\w+' is .*, which no cache has\)"):
        list(read_blocks(str(path.parent), np.array([0, 1]), ["cls"]))
    with pytest.raises(DataError, match="which no cache has"):
        list_sizes(str(path.parent), ["cls"])
    if place == "row_id":
        with pytest.raises(DataError, match="which no cache has"):
            read_row_ids(path)
    assert not has_run()


@pytest.mark.parametrize("column", ["row_id", "pixels"])
def test_a_cache_of_pixels_runs_nothing(tmp_path, payload, column):
    bytes_, has_run = payload
    columns = {"row_id": pa.array([0, 1]), "pixels": pa.array([bytes(12)] * 2, pa.binary(12))}
    columns[column] = extension(pa.array([bytes_] * 2, pa.large_binary()))
    batch = pa.record_batch(columns)
    path = tmp_path / "rows-000000000000.arrow"
    with pa.ipc.new_file(str(path), batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(DataError, match="which no cache has"):
        open_pixels(str(tmp_path), np.array([0, 1]), (2, 2, 3))
    with pytest.raises(DataError, match="which no cache has"):
        read_row_ids(path)
    assert not has_run()


# Types and sizes


@pytest.mark.parametrize(
    "kind", [pa.date32(), pa.decimal128(5, 2), pa.list_(pa.field("element", pa.string())), pa.binary()]
)
def test_labels_of_other_types_are_refused(tmp_path, kind):
    pq.write_table(pa.table({"image": [png()], "label": pa.nulls(1, kind)}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=re.escape(f"column 'label' is {kind}; accepted: text or whole numbers")):
        list_source(DataConfig(source=str(tmp_path / "x.parquet")))


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_labels_of_every_type_of_text(tmp_path, kind):
    labels = pa.array(["a", None, "b", "a"] * 10)
    labels = labels.cast(kind) if not pa.types.is_dictionary(kind) else labels.dictionary_encode().cast(kind)
    pq.write_table(pa.table({"image": [png(n) for n in range(40)], "label": labels}), tmp_path / "x.parquet")
    rows = list_source(DataConfig(source=str(tmp_path / "x.parquet"))).rows
    assert [row.label for row in rows] == ["a", None, "b", "a"] * 10
    assert [row.problem for row in rows[:3]] == [None, "no label", None]


@pytest.mark.parametrize(
    ("kind", "labels"), [(pa.uint8(), [1, 2]), (pa.float64(), [1.0, 2.0]), (pa.bool_(), [True, False])]
)
def test_labels_that_are_numbers(tmp_path, kind, labels):
    pq.write_table(pa.table({"image": [png(), png(1)], "label": pa.array(labels, kind)}), tmp_path / "x.parquet")
    assert [row.label for row in list_source(DataConfig(source=str(tmp_path / "x.parquet"))).rows] == labels


def test_rows_with_paths_outside_the_file_and_rows_with_bytes(tmp_path):
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "outside.png").write_bytes(png(99))
    cells = [{"bytes": png(n), "path": f"{n}.png"} for n in range(99)] + [{"bytes": None, "path": "outside"}]
    pq.write_table(pa.table({"image": cells, "label": list("ab" * 50)}), tmp_path / "x.parquet", row_group_size=30)
    index = load_index(DataConfig(source=str(tmp_path / "x.parquet"), image_folder="i", image_suffix=".png"), seed=0)
    assert index.bad_rows == ()
    assert index.table["path"][99].as_py() == str(tmp_path / "i" / "outside.png")
    assert index.table["position"].to_pylist() == [*range(99), -1]


def test_a_label_as_long_as_a_book_is_refused_once_for_all_rows(tmp_path):
    labels = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["x" * 2**20]))
    pq.write_table(pa.table({"image": ["x"] * 100_000, "label": labels}), tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 2**21  # 100 GB, if each row had its own
    with pytest.raises(DataError, match="1,048,576 bytes are too many; accepted: at most 65,536"):
        list_source(DataConfig(source=str(tmp_path / "x.parquet")))


def test_a_column_that_unpacks_to_much_is_not_unpacked(tmp_path):
    images = pa.array([bytes(2**20)] * 100)
    labels = list("ab" * 50)
    pq.write_table(
        pa.table({"image": images, "label": labels}), tmp_path / "x.parquet", compression="zstd", use_dictionary=False
    )
    assert (tmp_path / "x.parquet").stat().st_size < 2**18
    image = read_image_bytes([str(tmp_path / "x.parquet")], [0], [None], "image")[0]
    assert "MiB to 100 MiB when it is unpacked; accepted: at most 100 times" in str(image)


def test_a_column_name_that_stands_twice(tmp_path):
    table = pa.table([pa.array([png()]), pa.array(["a"]), pa.array(["b"])], names=["image", "label", "label"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match="column 'label' stands twice in the file"):
        list_source(DataConfig(source=str(tmp_path / "x.parquet")))


@pytest.mark.parametrize("column", ["bytes", "struct"])
def test_an_image_of_many_rows_is_kept_once(tmp_path, column):
    """2 KB of Parquet took 5 GB, as 64 copies of an image of 40 MB were made at once."""
    image = png(1) + bytes(2**24)
    cells = pa.DictionaryArray.from_arrays(pa.array([0] * 6 + [None], pa.int32()), pa.array([image]))
    if column == "struct":
        cells = pa.array([{"bytes": image, "path": "x"}] * 6 + [{"bytes": None, "path": "y"}])
    table = pa.table({"image": cells, "label": [0] * 7})
    source = str(tmp_path / "x.parquet")
    pq.write_table(table, source, compression="zstd", dictionary_pagesize_limit=2**30, store_schema=False)
    *images, lacking = read_image_bytes([source] * 7, list(range(7)), [None] * 7, "image")
    assert images[0] == image
    assert len({id(each) for each in images}) == 1
    assert str(lacking) == "no image in this row"


def test_a_label_made_of_columns_is_told_and_a_column_of_groups_is_no_class(tmp_path):
    """As in text tables."""
    for number in range(12):
        Image.new("RGB", (4, 4), (20 * number, 0, 0)).save(tmp_path / f"{number}.png")
    flags = [number % 2 for number in range(12)]
    columns = {"path": [f"{n}.png" for n in range(12)], "odd": flags, "even": [1 - flag for flag in flags]}
    pq.write_table(pa.table({**columns, "group": [1 - flag for flag in flags]}), tmp_path / "t.parquet")
    listing = list_source(DataConfig(source=str(tmp_path / "t.parquet"), group="group"))
    assert [row.label for row in listing.rows] == ["even", "odd"] * 6
    assert [warning for warning in listing.warnings if "name another column with data.label" in warning]
