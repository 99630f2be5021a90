"""Any file at all is either a listing of images or a DataError; nothing else is raised, and nothing hangs."""

import io
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from raysweep.errors import DataError
from raysweep.experiment.sections import DataConfig
from raysweep.images.index import ImageIndex, load_index

NAMES = [f"{number}.png" for number in range(12)]
PATHS = [
    *NAMES, *("./0.png", "gone.png", "0", "i/0.png", "/dev/zero", "pipe.png", "folder", r"i\0.png", "%30.png", "a\0b"),
    *("file:///x", "file://[", "file://h/x", "s3://b/x.png", "s3://b/x?endpoint_override=127.0.0.1:1", "gs://u:p@b/x"),
    *("hf://x", "hf://datasets/a/b/c", "http://127.0.0.1:1/x", "://", "C:/x", "..", "../" * 9 + "etc/x", "x" * 300),
]  # fmt: skip
COLUMNS = ["image", "label", "split", "file_name", "class", "", " ", "Image", "group", "bytes", "path", "Unnamed: 0"]
VALUES = [
    "a",
    "b",
    "0",
    "1",
    "1.0",
    "nan",
    "",
    " ",
    "train",
    "test",
    "val",
    "\ud800",
    "\x1b[31m",
    "\u202e",
    "=1+1",
    "é",
]

texts = st.sampled_from(PATHS) | st.sampled_from(VALUES) | st.text(max_size=8)
numbers = st.integers() | st.floats() | st.integers(0, 12) | st.booleans() | st.none()
json_values = st.recursive(
    texts | numbers,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(COLUMNS) | texts, inner, max_size=3),
    max_leaves=5,
)
suffixes = st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"])


@st.composite
def delimited(draw):
    """A CSV file with good rows, and rows and a header of anything."""
    delimiter = draw(st.sampled_from([",", ",", ";", "\t", "|"]))
    header = draw(st.just(["image", "label"]) | st.lists(st.sampled_from(COLUMNS) | texts, max_size=5))
    good = [[name, "ab"[number % 2], *([""] * (len(header) - 2))] for number, name in enumerate(NAMES)]
    rows = [*good, *draw(st.lists(st.lists(texts, max_size=5), max_size=5))]
    quote = draw(st.sampled_from(["", '"', '"', "'"]))
    lines = [delimiter.join(f"{quote}{cell}{quote}" for cell in row) for row in [header, *rows]]
    end = draw(st.sampled_from(["\n", "\r\n", "\r", "\n\n"]))
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"]))
    return draw(st.sampled_from([".csv", ".tsv"])), end.join(lines).encode(encoding, "replace")


@st.composite
def json_lines(draw):
    """A JSON Lines file with good rows, and lines of anything."""
    good = [{"image": name, "label": "ab"[number % 2]} for number, name in enumerate(NAMES)]
    keys = st.sampled_from(COLUMNS) | texts
    rows = [*good, *draw(st.lists(st.dictionaries(keys, json_values, max_size=4) | json_values, max_size=5))]
    lines = [json.dumps(row) for row in rows] + draw(st.lists(st.text(max_size=10), max_size=2))
    return ".jsonl", "\n".join(lines).encode(errors="replace")


@st.composite
def parquet(draw):
    """A Parquet file with columns of anything, in which some bytes may be changed."""
    num_rows = draw(st.integers(0, 14) | st.just(12))
    columns = {}
    for name in draw(st.lists(st.sampled_from(COLUMNS), unique=True, max_size=5) | st.just(["image", "label"])):
        cells = st.one_of(
            st.sampled_from(PATHS), st.sampled_from(["a", "b"]), st.integers(0, 3), st.floats(), st.binary(max_size=9),
            st.lists(st.integers(0, 3), max_size=2), st.dates(), st.decimals(0, 9, places=2), st.booleans(),
            st.fixed_dictionaries({"bytes": st.none() | st.just(png()), "path": st.none() | st.sampled_from(PATHS)}),
        )  # fmt: skip
        kind = draw(st.integers(0, 9))
        column = draw(st.lists(cells.map(_of_kind(kind)) | st.none(), min_size=num_rows, max_size=num_rows))
        columns[name] = column
    if num_rows == len(NAMES) and draw(st.booleans()):
        columns |= {"image": draw(st.sampled_from([NAMES, list(map(png, range(12)))])), "label": list("ab" * 6)}
    file = io.BytesIO()
    try:
        pq.write_table(pa.table(columns), file, row_group_size=draw(st.integers(1, 20)))
    except (pa.ArrowException, TypeError, OverflowError):
        return ".parquet", b""
    content = bytearray(file.getvalue())
    for place in draw(st.lists(st.integers(0, len(content) - 1), max_size=draw(st.sampled_from([0, 0, 3])))):
        content[place] = draw(st.integers(0, 255))
    return ".parquet", bytes(content)


def _of_kind(kind):
    kinds = [str, str, int, float, bytes, list, object, object, bool, dict]
    return lambda value: value if isinstance(value, kinds[kind]) else None


def png(number: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


CONTENTS = {
    "delimited": delimited(),
    "json_lines": json_lines(),
    "parquet": parquet(),
    "bytes": st.tuples(suffixes, st.binary(max_size=200)),
}
BAD = (".parquet", b"")


def good(kind: str) -> tuple[str, bytes]:
    """A listing that must be taken."""
    rows = [{"image": name, "label": "ab"[number % 2]} for number, name in enumerate(NAMES)]
    if kind == "parquet":
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), file)
        return ".parquet", file.getvalue()
    if kind == "delimited":
        return ".csv", "\n".join(["image,label", *(",".join(row.values()) for row in rows)]).encode()
    return ".jsonl", "\n".join(map(json.dumps, rows)).encode()


NUM_EXAMPLES = int(os.environ.get("RAYSWEEP_FUZZ_EXAMPLES", "75"))  # make fuzz takes 10,000


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(png(number))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    return tmp_path


@pytest.mark.parametrize("kind", CONTENTS)
def test_any_table_is_an_index_or_a_data_error(folder, kind):
    outcomes = {True: 0, False: 0}

    @settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @example(good(kind), {})
    @example(BAD, {})
    @given(CONTENTS[kind], st.sampled_from([{}, {}, {"image_folder": "folder"}, {"image_suffix": ".jpg, .png"}]))
    def run(content, keys):
        table = folder / f"table{content[0]}"
        table.write_bytes(content[1])
        try:
            index = load_index(DataConfig(source=str(table), max_bad_fraction=0.6, **keys), seed=0)
        except DataError as error:
            str(error).encode()  # it can be printed
            outcomes[False] += 1
            return
        assert isinstance(index, ImageIndex)
        assert index.num_rows_found == len(index.table) + len(index.bad_rows)
        outcomes[True] += 1

    run()
    assert outcomes[False]
    assert outcomes[True]
