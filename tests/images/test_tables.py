import io
import json
import os
import re
import socket
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from raysweep.errors import ConfigError, DataError
from raysweep.experiment.config import load_experiment
from raysweep.experiment.sections import DataConfig
from raysweep.images import row_paths, tables
from raysweep.images.image_bytes import read_image_bytes
from raysweep.images.index import load_index
from raysweep.images.listing import list_source
from raysweep.images.tables import read_file, read_table
from raysweep.storage import filesystems
from raysweep.storage.filesystems import join_source


def png(number: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, names) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))


def write_csv(folder: Path, names, header="image,label", name="train.csv") -> Path:
    lines = [header, *(f"{cell},{'ab'[number % 2]}" for number, cell in enumerate(names))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def index_of(source, **keys):
    return load_index(DataConfig(source=str(source), **keys), seed=0)


def paths_of(listing, folder):
    return [os.path.relpath(row.path, folder) for row in listing.rows]


# Where the images are


NAMES = [f"{number}" for number in range(20)]


@pytest.mark.parametrize(
    ("names", "files", "keys"),
    [
        (NAMES, [f"train_images/{n}.png" for n in NAMES], {"image_folder": "train_images", "image_suffix": ".png"}),
        (NAMES, [f"{n}.jpeg" for n in NAMES], {"image_suffix": ".jpeg"}),
        ([f"{n}.jpg" for n in NAMES], [f"{n}.png" for n in NAMES], {"image_suffix": ".png"}),
        ([f"{n}.jpg" for n in NAMES], [f"{n}.JPG" for n in NAMES], {"image_suffix": ".JPG"}),
        ([f"{n}.jpg" for n in NAMES], [f"a/b/{n}.jpg" for n in NAMES], {"image_folder": "a/b"}),
        (NAMES, [f"{n}{'.jpg' if int(n) % 3 else '.PNG'}" for n in NAMES], {"image_suffix": ".jpg, .PNG"}),
        (
            [f"{n}.jpg" for n in NAMES],
            [f"i/{n}.{'JPG' if int(n) % 3 else 'jpg'}" for n in NAMES],
            {"image_folder": "i", "image_suffix": ".JPG, .jpg"},
        ),
        (
            [f"{n}.{'jpg' if int(n) % 2 else 'png'}" for n in NAMES],
            [f"i/{n}.{'jpg' if int(n) % 2 else 'png'}" for n in NAMES],
            {"image_folder": "i"},
        ),
        ([f"{n}.jpg" for n in NAMES], [f"{n}.jpg.png" for n in NAMES], {"image_suffix": ".jpg.png"}),
        ([f"./{n}.jpg" for n in NAMES], [f"images/{n}.jpg" for n in NAMES], {"image_folder": "images"}),
        ([f"cat/{n}.jpg" for n in NAMES], [f"x/cat/{n}.jpg" for n in NAMES], {"image_folder": "x"}),
        (
            [f"/kaggle/input/leaves/train/{n}.jpg" for n in NAMES],
            [f"train/{n}.jpg" for n in NAMES],
            {"image_prefix": "/kaggle/input/leaves/"},
        ),
        (
            [f"/kaggle/input/leaves/{'ab'[int(n) % 2]}/{n}" for n in NAMES],
            [f"pictures/{'ab'[int(n) % 2]}/{n}.webp" for n in NAMES],
            {"image_prefix": "/kaggle/input/leaves/", "image_folder": "pictures", "image_suffix": ".webp"},
        ),
        (
            [rf"C:\Users\me\data\{n}.jpg" for n in NAMES],
            [f"images/{n}.jpg" for n in NAMES],
            {"image_prefix": "C:/Users/me/data/", "image_folder": "images"},
        ),
        ([f"gs://theirs/x/{n}.jpg" for n in NAMES], [f"{n}.jpg" for n in NAMES], {"image_prefix": "gs://theirs/x/"}),
        (
            [f"patient.{n}" for n in NAMES],
            [f"i/patient.{n}.png" for n in NAMES],
            {"image_folder": "i", "image_suffix": ".png"},
        ),
        (
            ["a%20b/" + n for n in NAMES],
            [f"i/a b/{n}.png" for n in NAMES],
            {"image_folder": "i", "image_suffix": ".png"},
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_the_error_names_the_keys_that_find_the_images(tmp_path, names, files, keys, suffix):
    """The lines of YAML in the message are followed, and every image is found."""
    write_images(tmp_path, files)
    write_images(tmp_path / "other", ["preview.png"])
    labels = ["ab"[number % 2] for number in range(len(names))]
    table = tmp_path / f"train{suffix}"
    if suffix == ".csv":
        write_csv(tmp_path, names)
    elif suffix == ".jsonl":
        rows = [{"image": n, "label": label} for n, label in zip(names, labels, strict=True)]
        table.write_text("\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.table({"image": names, "label": labels}), table)
    with pytest.raises(DataError, match="name no file, such as") as raised:
        index_of(table)
    written = yaml.safe_load(str(raised.value).partition("write:\n")[2])
    assert written == {"data": keys}
    index = index_of(table, **written["data"])
    assert index.bad_rows == ()
    assert {os.path.relpath(path, tmp_path) for path in index.table["path"].to_pylist()} == set(files)


def test_integer_ids_are_names_of_files(tmp_path):
    write_images(tmp_path, [f"i/{number}.png" for number in range(1000, 1020)])
    pq.write_table(pa.table({"image": list(range(1000, 1020)), "label": list("ab" * 10)}), tmp_path / "x.parquet")
    lines = [json.dumps({"image": number, "label": "ab"[number % 2]}) for number in range(1000, 1020)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    for name in ("x.parquet", "x.jsonl"):
        assert index_of(tmp_path / name, image_folder="i", image_suffix=".png").num_rows_found == 20


def test_ids_that_lost_their_zeros_are_told(tmp_path):
    write_images(tmp_path, [f"i/{number:03}.png" for number in range(20)])
    with pytest.raises(DataError, match=r"lack leading zeros .* write them as text, such as .*/i/001\.png for 1$"):
        index_of(write_csv(tmp_path, [str(number) for number in range(1, 20)]))
    assert index_of(write_csv(tmp_path, [f"{n:03}" for n in range(20)]), image_folder="i", image_suffix=".png")


def test_names_in_another_case_are_told(tmp_path):
    write_images(tmp_path, [f"i/Img{number}.png" for number in range(20)])
    with pytest.raises(DataError, match="differ in upper and lower case"):
        index_of(write_csv(tmp_path, [f"img{number}" for number in range(20)]))


def test_images_beside_the_tables_folder_are_found(tmp_path):
    write_images(tmp_path, [f"images/{n}.png" for n in NAMES])
    table = write_csv(tmp_path / "tables", NAMES)
    with pytest.raises(DataError, match=r"image_folder: ../images\n    image_suffix: .png"):
        index_of(table)
    assert index_of(table, image_folder="../images", image_suffix=".png").num_rows_found == 20
    assert index_of(table, image_folder=str(tmp_path / "images"), image_suffix=".png").num_rows_found == 20


def test_where_two_folders_fit_both_are_named(tmp_path):
    write_images(tmp_path, [f"{folder}/{n}.png" for n in NAMES for folder in ("large", "small")])
    with pytest.raises(DataError, match="2 ways fit; write one of them") as raised:
        index_of(write_csv(tmp_path, NAMES))
    assert re.findall("image_folder: (.*)", str(raised.value)) == ["large", "small"]


def test_images_in_several_folders_are_told(tmp_path):
    write_images(tmp_path, [f"train/{'ab'[int(n) % 2]}/{n}.jpg" for n in NAMES])
    with pytest.raises(DataError, match=r"lie in 2 folders \(train/a, train/b\); accepted: rows that name the folder"):
        index_of(write_csv(tmp_path, NAMES))


def test_images_of_a_neighbours_project_are_not_proposed(tmp_path):
    write_images(tmp_path / "other", [f"images/{n}.jpg" for n in NAMES])
    with pytest.raises(DataError, match="20 of 20 rows cannot be used"):
        index_of(write_csv(tmp_path / "mine", NAMES))


def test_images_are_found_beside_names_that_are_not_utf8_and_links_to_themselves(tmp_path):
    write_images(tmp_path / "data", [f"i/{n}.png" for n in NAMES])
    for folder in (tmp_path, tmp_path / "data", tmp_path / "data" / "i"):
        (folder / "itself").symlink_to("itself")
        try:
            open(os.path.join(os.fsencode(folder), b"\xff.png"), "wb").close()
        except OSError:
            pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(DataError, match=r"image_folder: i\n    image_suffix: .png"):
        index_of(write_csv(tmp_path / "data", NAMES))
    assert index_of(tmp_path / "data" / "train.csv", image_folder="i", image_suffix=".jpg, .png").num_rows_found == 20


def test_a_row_below_a_file_is_a_bad_row(tmp_path):
    write_images(tmp_path, [f"{n}.png" for n in NAMES])
    table = write_csv(tmp_path, [*NAMES, "train.csv/x", "a\0b/x"])
    index = index_of(table, image_suffix=".jpg, .png", max_bad_fraction=0.1)
    assert [bad.row_id for bad in index.bad_rows] == [20, 21]


def test_a_key_that_is_in_the_way_is_taken_out(tmp_path):
    write_images(tmp_path, [f"{n}.png" for n in NAMES])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"image_folder: null\n    image_suffix: \.png"):
        index_of(write_csv(tmp_path, NAMES), image_folder="empty", image_suffix=".jpg")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data.image_folder: .*/wrong: no such folder; accepted: a path relative to"):
        index_of(write_csv(tmp_path, NAMES), image_folder="wrong")


def test_a_few_missing_images_are_bad_rows_and_nothing_is_looked_for(tmp_path):
    write_images(tmp_path, [*(f"{n}.png" for n in NAMES[:15]), *(f"other/{n}.png" for n in NAMES[15:])])
    index = index_of(write_csv(tmp_path, [f"{n}.png" for n in NAMES]), max_bad_fraction=0.3)
    assert [bad.reason for bad in index.bad_rows] == ["no such file"] * 5


@pytest.mark.parametrize(
    ("names", "files", "what"),
    [
        ([rf"a\b\{n}.png" for n in NAMES], [f"a/b/{n}.png" for n in NAMES], "20 paths of images have backslashes"),
        ([f"my%20cat%23{n}.png" for n in NAMES], [f"my cat#{n}.png" for n in NAMES], "20 .* percent escapes"),
        (["caf\u00e9/" + n + ".png" for n in NAMES], ["cafe\u0301/" + n + ".png" for n in NAMES], "20 .* composed"),
        (["cafe\u0301/" + n + ".png" for n in NAMES], ["caf\u00e9/" + n + ".png" for n in NAMES], "20 .* decomposed"),
        ([rf"a%20b\{n}.png" for n in NAMES], [f"a b/{n}.png" for n in NAMES], "backslashes"),
    ],
)
def test_paths_in_another_spelling_are_read_with_a_word(tmp_path, names, files, what):
    write_images(tmp_path, files)
    index = index_of(write_csv(tmp_path, names))
    assert index.bad_rows == ()
    assert any(re.search(what, warning) for warning in index.warnings), index.warnings


def test_paths_that_name_files_are_read_as_they_are(tmp_path):
    write_images(tmp_path, [rf"a\{n}%20.png" for n in NAMES])
    index = index_of(write_csv(tmp_path, [rf"a\{n}%20.png" for n in NAMES]))
    assert index.bad_rows == ()
    assert not any("paths of images" in warning for warning in index.warnings)


def test_few_rows_of_a_long_table_are_looked_for_in_advance(tmp_path, monkeypatch):
    looked_for = []
    monkeypatch.setattr(row_paths, "_exists", lambda path: looked_for.append(path) or True)
    table = write_csv(tmp_path, [f"{number}.png" for number in range(20_000)])
    assert len(read_table(str(table), DataConfig(source=str(table))).rows) == 20_000
    assert 30 < len(looked_for) < 40
    assert looked_for[-1].endswith("/19375.png")


# Which places a row may name


@pytest.fixture
def listener(monkeypatch):
    """An HTTP server that counts what arrives, and the credentials that it must not get."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTTESTTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-so-secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    arrived: list[bytes] = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(2)
                arrived.append(connection.recv(65536))
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    threading.Thread(target=serve, daemon=True).start()
    yield f"127.0.0.1:{server.getsockname()[1]}", arrived
    server.close()


def reads(index_or_listing):
    rows = [row for row in index_or_listing.rows if row.problem is None]
    return read_image_bytes([row.path for row in rows], [row.position for row in rows], [None] * len(rows), "image")


def test_the_listener_would_notice(listener):
    host, arrived = listener
    with pytest.raises(DataError):
        read_file(f"s3://bucket/y.jpg?endpoint_override={host}&scheme=http&allow_bucket_creation=false")
    assert b"AKIATESTTESTTEST" in b"".join(arrived)


HOSTILE = [
    "s3://bucket/y.jpg?endpoint_override={host}&scheme=http",
    "s3://bucket/y.jpg?region=x&endpoint_override={host}&scheme=http",
    "s3://anonymous@bucket/y.jpg?endpoint_override={host}&scheme=http",
    "S3://bucket/y.jpg?endpoint_override={host}&scheme=http",
    "gs://bucket/y.jpg?endpoint_override={host}&scheme=http",
    "y.jpg?endpoint_override={host}&scheme=http",
    "./y.jpg?endpoint_override={host}&scheme=http",
    r"s3:\\bucket\y.jpg?endpoint_override={host}&scheme=http",
    "s3%3A%2F%2Fbucket%2Fy.jpg%3Fendpoint_override={host}&scheme=http",
    "http://{host}/y.jpg",
    "https://{host}/y.jpg",
    "ftp://{host}/y.jpg",
    "hdfs://{host}/y.jpg",
    "abfs://container@{host}/y.jpg",
    "file://{host}/y.jpg",
    "//{host}/y.jpg",
    "s3://user:word@{host}/y.jpg",
    "hf://datasets/other/name/y.jpg",
]


@pytest.mark.parametrize("row", HOSTILE)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", "struct"])
def test_no_row_sends_anything_anywhere(tmp_path, listener, row, suffix):
    host, arrived = listener
    row = row.format(host=host)
    rows = [row, "x.png"]
    write_images(tmp_path, ["x.png"])
    table = tmp_path / f"rows{suffix if suffix != 'struct' else '.parquet'}"
    if suffix == ".csv":
        write_csv(tmp_path, rows, name="rows.csv")
    elif suffix == ".jsonl":
        table.write_text("\n".join(json.dumps({"image": {"path": row}, "label": "a"}) for row in rows))
    else:
        images = [{"bytes": None, "path": row} for row in rows] if suffix == "struct" else rows
        pq.write_table(pa.table({"image": images, "label": ["a", "b"]}), table)
    listing = list_source(DataConfig(source=str(table)))
    outcomes = reads(listing)
    assert outcomes[-1] == png()
    assert all(isinstance(outcome, DataError) for outcome in outcomes[:-1])
    assert "word" not in str(listing.rows[0].problem)
    assert arrived == []


@pytest.mark.parametrize("row", ["../pr/1/x.png", "hf://datasets/a/b@refs/pr/1/x.png", "hf://datasets/a/b@main/x.png"])
def test_a_row_cannot_name_another_revision_of_a_dataset(row):
    table = "hf://datasets/a/b@refs/convert/parquet/d/t.csv"
    paths = row_paths.RowPaths.of(table, DataConfig(source=table))
    assert paths.path_of("../x.png") == "hf://datasets/a/b@refs/convert/parquet/x.png"
    with pytest.raises(DataError, match=r"leaves|where data.source does not lie"):
        paths.path_of(row if row.startswith("hf") else f"../../{row}")


@pytest.fixture
def folder_as_bucket(tmp_path, monkeypatch):
    """A bucket made of a local folder; its connections are recorded."""
    from pyarrow import fs

    asked = []

    def connect(*parts):
        asked.append(parts)
        return (
            fs.SubTreeFileSystem(str(tmp_path / "remote"), fs.LocalFileSystem()) if parts[0] else fs.LocalFileSystem()
        )

    monkeypatch.setattr(filesystems, "_connect", connect)
    write_images(tmp_path / "remote", ["bucket/i/0.png", "bucket/i/1.png", "bucket/other/2.png", "second/3.png"])
    return tmp_path / "remote" / "bucket", asked


def list_rows(bucket, *names, source="s3://bucket/i/rows.csv", **keys):
    write_csv(bucket / "i", names, name="rows.csv")
    return list_source(DataConfig(source=source, max_bad_fraction=1, **keys)).rows


def test_rows_of_a_bucket_stay_in_it(folder_as_bucket, tmp_path):
    folder, asked = folder_as_bucket
    (tmp_path / "local.png").write_bytes(png())
    local = str(tmp_path / "local.png")
    good = ["0.png", "./1.png", "../other/2.png", "s3://bucket/i/0.png"]
    bad = ["../../second/3.png", "s3://second/3.png", "s3://bucket/../second/3.png", "gs://bucket/i/0.png", local]
    bad += [
        f"file://{local}",
        "s3://bucket2/x.png",
        "s3://bucket.evil/x.png",
        f"{'../' * 20}{local[1:]}",
        "/etc/passwd",
    ]
    rows = list_rows(folder, *good, *bad, source="s3://bucket/i/rows.csv?region=eu")
    assert [row.problem for row in rows[:4]] == [None] * 4
    assert [row.path for row in rows[:4]] == [
        "s3://bucket/i/0.png?region=eu",
        "s3://bucket/i/1.png?region=eu",
        "s3://bucket/other/2.png?region=eu",
        "s3://bucket/i/0.png?region=eu",
    ]
    outcomes = [row.problem or read_image_bytes([row.path], [-1], [None], None)[0] for row in rows[4:]]
    assert not any(isinstance(outcome, bytes) for outcome in outcomes), outcomes
    assert {parts for parts in asked if parts[0]} == {("s3", "bucket", "?region=eu")}
    assert "'../../second/3.png' leaves s3://bucket" in rows[4].problem
    assert "set data.allow_images_from: [s3://second]" in rows[5].problem
    assert "a table elsewhere may not" in rows[8].problem


def test_the_experiment_may_allow_other_places(folder_as_bucket, tmp_path):
    folder, _ = folder_as_bucket
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "local.png").write_bytes(png())
    names = [
        "s3://second/3.png",
        f"{tmp_path}/here/local.png",
        f"{tmp_path}/here/../remote/second/3.png",
        "gs://second/3.png",
    ]
    rows = list_rows(folder, *names, allow_images_from=["s3://second?region=us", str(tmp_path / "here")])
    assert [row.problem is None for row in rows] == [True, True, False, False]
    assert rows[0].path == "s3://second/3.png?region=us"
    (tmp_path / "rows.csv").write_text("image,label\ns3://second/3.png,a\n")
    local = {"source": str(tmp_path / "rows.csv"), "max_bad_fraction": 1}
    assert list_source(DataConfig(**local)).rows[0].problem
    assert list_source(DataConfig(**local, allow_images_from=["s3://second"])).rows[0].path == "s3://second/3.png"
    part = list_source(DataConfig(**local, allow_images_from=["s3://second/sec"]))
    assert "s3://second" in part.rows[0].problem


def test_images_of_a_bucket_in_another_folder(folder_as_bucket):
    folder, _ = folder_as_bucket
    write_images(folder, [f"pictures/{n}.png" for n in NAMES])
    write_csv(folder / "t", NAMES, name="rows.csv")
    source = "s3://bucket/t/rows.csv"
    with pytest.raises(DataError, match=r"image_folder: \.\./pictures\n    image_suffix: \.png"):
        index_of(source)
    assert index_of(source, image_folder="../pictures", image_suffix=".png").num_rows_found == 20
    assert index_of(source, image_folder="s3://bucket/pictures", image_suffix=".png").num_rows_found == 20


@pytest.mark.process
def test_a_bucket_of_a_server(bucket):
    """Folder and suffix are found in a listing of real objects, and odd names of objects are read as they are."""
    import boto3

    client, name = boto3.client("s3"), bucket.split("/")[2]
    odd = "pictures/0?endpoint_override=127.0.0.1:9&scheme=http.png"
    for number, key in enumerate([*(f"pictures/{n}.png" for n in NAMES), odd]):
        client.put_object(Bucket=name, Key=f"some/prefix/{key}", Body=png(number))
    lines = ["image,label", *(f"{n},{'ab'[int(n) % 2]}" for n in [*NAMES])]
    client.put_object(Bucket=name, Key="some/prefix/rows.csv", Body="\n".join(lines).encode())
    with pytest.raises(DataError, match=r"data:\n    image_folder: pictures\n    image_suffix: \.png"):
        index_of(f"{bucket}/rows.csv")
    index = index_of(f"{bucket}/rows.csv", image_folder="pictures", image_suffix=".png")
    assert index.bad_rows == ()
    assert read_file(join_source(bucket, odd)) == png(len(NAMES))


def test_a_bucket_without_credentials_stays_without_them(folder_as_bucket):
    folder, _ = folder_as_bucket
    rows = list_rows(folder, "0.png", "s3://bucket/i/0.png", source="s3://anonymous@bucket/i/rows.csv")
    assert [row.path for row in rows] == ["s3://anonymous@bucket/i/0.png"] * 2


def test_a_local_table_may_name_every_local_path(tmp_path):
    write_images(tmp_path, ["a/0.png", "b/1.png", "2.png"])
    names = ["0.png", "../b/1.png", f"{tmp_path}/2.png", f"file://{tmp_path}/2.png"]
    listing = list_source(DataConfig(source=str(write_csv(tmp_path / "a", names))))
    assert paths_of(listing, tmp_path) == ["a/0.png", "b/1.png", "2.png", "2.png"]
    assert all(isinstance(image, bytes) for image in reads(listing))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("image_suffix: png", "accepted: the end of the files' names, such as .png or .jpg, .png; found png"),
        ("image_suffix: '.png, jpg'", "accepted: the end of the files' names"),
        ("image_suffix: /x.png", "accepted: the end of the files' names"),
        ("allow_images_from: ['https://x']", "accepted: s3://bucket, gs://bucket"),
        ("allow_images_from: ['s3://']", "accepted: s3://bucket, gs://bucket"),
        ("allow_images_from: ['s3://k:secret@b']", "credentials belong into the environment"),
        ("image_folder: 's3://k:secret@b'", "credentials belong into the environment"),
    ],
)
def test_keys_that_cannot_be_used(tmp_path, keys, message):
    file = tmp_path / "x.yaml"
    file.write_text(f"name: x\ndata:\n  source: s\n  {keys}\nencoders: [{{type: stacked_cnn}}]\n")
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        load_experiment(file)
    assert "secret" not in str(raised.value)


# What spreadsheets export


def rows_of(tmp_path, content, name="x.csv", **keys):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(content)
    listing = read_table(str(tmp_path / name), DataConfig(source=str(tmp_path / name), **keys))
    return [(os.path.basename(row.path), row.label, row.problem) for row in listing.rows], listing.warnings


GOOD = [("a.png", "x", None), ("b.png", "y", None)]


@pytest.mark.parametrize(
    ("content", "warnings"),
    [
        ("image,label,,\na.png,x,,\nb.png,y,,\n", []),
        ("image,label,,\na.png,x\nb.png,y,,,,\n", []),
        ("image,label\na.png,x,,\nb.png,y\n", []),
        (",image,label\n0,a.png,x\n1,b.png,y\n", ["1 column without a name left out"]),
        ("Unnamed: 0,image,label\n0,a.png,x\n1,b.png,y\n", []),
        ("image,,label,\na.png,,x,n\nb.png,,y,\n", ["1 column without a name left out"]),
        ("image,label\na.png,x\n,\n\nb.png,y\n,\n , \n", ["3 empty rows left out"]),
        ("\n,\nimage,label\na.png,x\nb.png,y\n", []),
        ("\ufeffimage;label\na.png;x\nb.png;y\n", ["the columns are separated by semicolons"]),
        ("image\tlabel\na.png\tx\nb.png\ty\n", ["the columns are separated by tabs"]),
        ("image|label\na.png|x\nb.png|y\n", ["the columns are separated by vertical bars"]),
        ("sep=;\r\nimage;label\r\na.png;x\r\nb.png;y\r\n", ["the columns are separated by semicolons"]),
        ("image\tlabel\na.png\tx\nb.png\ty\n".encode("utf-16"), ["the columns are separated by tabs"]),
        ("image,label\ra.png,x\rb.png,y\r", []),
    ],
)
def test_exports_of_spreadsheets(tmp_path, content, warnings):
    write_images(tmp_path, ["a.png", "b.png"])
    assert rows_of(tmp_path, content) == (GOOD, warnings)


def test_fields_beyond_the_header_are_a_bad_row(tmp_path):
    rows, _ = rows_of(tmp_path, "image,label,,\na.png,x,,,1\na.png\n", max_bad_fraction=1)
    assert [problem for *_, problem in rows] == ["5 fields where the header has 4", "1 fields where the header has 4"]


def test_a_column_that_stands_twice_is_still_told(tmp_path):
    with pytest.raises(DataError, match=r"x\.csv: a column name stands twice in the header: image, label, label"):
        rows_of(tmp_path, "image,label,label,,\n")


# Hostile tables


def test_half_a_character_in_json_is_a_bad_row(tmp_path):
    write_images(tmp_path, [f"{n}.png" for n in NAMES])
    bad = [r'{"image": "a\ud800.png", "label": "x"}', r'{"image": "1.png", "label": "\uDFFF"}', r'{"\ud800": 1}']
    good = [
        f'{{"image": "{n}.png", "label": "{("x", chr(92) + "ud83d" + chr(92) + "ude00")[int(n) % 2]}"}}' for n in NAMES
    ]
    (tmp_path / "x.jsonl").write_text("\n".join([*good, *bad, "[" * 100_000, "1" * 5000]))
    index = index_of(tmp_path / "x.jsonl", max_bad_fraction=0.5)
    reasons = [bad.reason for bad in index.bad_rows]
    assert reasons[:3] == [rf"half of a character (\u{code})" for code in ("d800", "dfff", "d800")]
    assert [reason.split(" (")[0] for reason in reasons[3:]] == ["not JSON"] * 2
    assert index.classes == ("x", "\U0001f600")


@pytest.mark.parametrize("name", ["pipe.csv", "pipe.jsonl", "pipe.parquet"])
def test_a_pipe_as_a_table_is_told_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="not a regular file, but a pipe or a device"):
        list_source(DataConfig(source=str(tmp_path / name)))


def test_rows_that_name_pipes_devices_and_folders_are_bad(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    write_images(tmp_path, [f"{n}.png" for n in NAMES])
    names = [f"{n}.png" for n in NAMES] + ["pipe.png", "/dev/zero", "/dev/stdin", "folder.png", "a\0b.png", "/dev/tty"]
    started = time.perf_counter()
    index = index_of(write_csv(tmp_path, names), max_bad_fraction=0.5)
    assert time.perf_counter() - started < 5
    assert len(index.bad_rows) == 6
    assert [bad.reason for bad in index.bad_rows][:2] == ["not a regular file, but a pipe or a device"] * 2
    assert index.bad_rows[3].reason == "a folder, not a file"


def test_files_that_are_too_large_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_TABLE_BYTES", 2**20)
    for name, size in (("x.csv", 2**21), ("x.png", 4 * 2**30)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)  # takes no room on the disk
    with pytest.raises(DataError, match=r"x\.csv: 2,097,152 bytes are too many; accepted: at most 1,048,576"):
        read_table(str(tmp_path / "x.csv"), DataConfig(source=str(tmp_path / "x.csv")))
    with pytest.raises(DataError, match=r"^4,294,967,296 bytes are too many"):
        read_file(str(tmp_path / "x.png"))


def test_a_cell_that_is_too_large_is_told(tmp_path):
    with pytest.raises(DataError, match=r"x\.csv: line \d: field larger than field limit"):
        rows_of(tmp_path, "image,label\na.png," + "x" * 200_000 + "\n")


def test_a_label_made_of_columns_is_told(tmp_path):
    lines = ["filename,male,female,dx"]
    for number in range(12):
        Image.new("RGB", (4, 4), (20 * number, 0, 0)).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{number % 2},{1 - number % 2},mel")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    index = load_index(DataConfig(source=str(tmp_path / "t.csv")), 0)
    assert index.classes == ("female", "male")
    assert [warning for warning in index.warnings if "name another column with data.label" in warning]
