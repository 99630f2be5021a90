import os
from pathlib import Path

import pytest

from raysweep.errors import ConfigError
from raysweep.experiment.yaml_file import Problem, config_error, dump_yaml, read_yaml, with_overrides


@pytest.fixture
def write(tmp_path):
    def write_text(text):
        path = tmp_path / "x.yaml"
        path.write_text(text)
        return path

    return write_text


def test_exponents_without_a_dot_are_numbers(write):
    data = read_yaml(write("a: 1e-4\nb: -2E+3\nc: '1e-4'\nd: 1e-4x\ne: no\nf: 1_000\n")).data
    assert data == {"a": 1e-4, "b": -2000.0, "c": "1e-4", "d": "1e-4x", "e": False, "f": 1000}


def test_lines_follow_a_path(write):
    file = read_yaml(write("a:\n  - b: 1\n  - b: 2\n    c: 3\n"))
    assert file.lines(("a", 1, "c")) == [1, 3, 4]
    assert file.lines(("a", 1, "missing")) == [1, 3]
    assert file.lines(("a", 9)) == [1]


def test_anchors_and_merge_keys_work(write):
    file = read_yaml(write("a: &x {k: 1}\nb: {<<: *x, l: 2}\nc: *x\n"))
    assert file.data == {"a": {"k": 1}, "b": {"k": 1, "l": 2}, "c": {"k": 1}}
    assert not file.problems


def test_a_merged_key_may_be_given_anew(write):
    file = read_yaml(write("a: &x {k: 1, l: 1}\nb: {<<: *x, k: 2}\nc: {<<: [*x, {k: 3, m: 3}]}\n"))
    assert file.data["b"] == {"k": 2, "l": 1}
    assert file.data["c"] == {"k": 1, "l": 1, "m": 3}
    assert not file.problems
    assert file.lines(("b", "k")) == [2, 2]
    assert file.lines(("b", "l")) == [2, 1]


def test_every_repeated_key_is_kept_as_a_problem(write):
    file = read_yaml(write("a: 1\na: 2\nb:\n  c: 1\n  c: 1\n  d: 1\n"))
    assert file.problems == (
        Problem(("a",), "given twice, first on line 1", 2),
        Problem(("b", "c"), "given twice, first on line 4", 5),
    )


def test_keys_that_are_not_text_are_problems(write):
    assert [problem.path for problem in read_yaml(write("on: 1\n5: 2\n'no': 3\n")).problems] == [("on",), ("5",)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("# nothing\n", "empty"),
        ("- a\n", "found a list"),
        ("hello\n", "found 'hello'"),
        ("a: {b: 1\nc: 2\n", "line 2, column 2: not valid YAML: expected ',' or '}'"),
        ("a:\n\t- b\n", "line 2, column 1: not valid YAML: found character '\\t'"),
        ("a: 1\n---\nb: 1\n", "line 2, column 1: not valid YAML: a second document"),
        ("a: !!python/object:os.system x\n", "could not determine a constructor"),
        ("a: *b\n", "undefined alias"),
        ("a: 2024-13-45\n", "month must be in 1..12"),
        ("a: \x07\n", "not valid YAML: unacceptable character"),
    ],
)
def test_unreadable_yaml_is_a_config_error(write, text, said):
    path = write(text)
    with pytest.raises(ConfigError) as error:
        read_yaml(path)
    assert str(error.value).startswith(f"{path}: ")
    assert said in str(error.value)


def test_missing_files_name_what_is_there(write):
    path = write("a: 1\n")
    with pytest.raises(ConfigError, match=r"no such file; did you mean '.*x\.yaml'"):
        read_yaml(path.with_name("xx.yaml"))
    with pytest.raises(ConfigError, match=r"no such file$"):
        read_yaml(path.parent / "nowhere" / "x.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(path.parent)


def test_files_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_yaml(tmp_path / "x.yaml")


def test_overrides_replace_and_create(write):
    file = with_overrides(
        read_yaml(write("a: {b: 1}\nc: [{d: 1}, {d: 2}]\n")), ["a.b=1e-3", "c.1.d=[x, y]", "e.f=", "a.g=2"]
    )
    assert file.data == {"a": {"b": 1e-3, "g": 2}, "c": [{"d": 1}, {"d": ["x", "y"]}], "e": {"f": None}}
    assert not file.problems


def test_overrides_leave_what_an_anchor_shares(write):
    file = with_overrides(read_yaml(write("a: &x {k: 1}\nb: *x\n")), ["b.k=2"])
    assert file.data == {"a": {"k": 1}, "b": {"k": 2}}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("a", "--set a: expected a.b.c=value"),
        ("=1", "expected a.b.c=value"),
        ("a..b=1", "expected a.b.c=value"),
        ("c.2.d=1", "c is a list of 1, counted from 0"),
        ("c.x=1", "c is a list of 1, counted from 0"),
        ("a.b.e=1", "a.b is 1 and has no keys"),
        ("a.b=[1", "not valid YAML"),
        ("a.b={k: 1, k: 2}", "given twice"),
    ],
)
def test_wrong_overrides_become_problems(write, override, said):
    (problem,) = with_overrides(read_yaml(write("a: {b: 1}\nc: [1]\n")), [override]).problems
    assert said in problem.message


def test_problems_are_listed_in_the_order_of_the_file(write):
    file = with_overrides(read_yaml(write("a: 1\nb:\n  c: 2\n")), ["a=3"])
    error = config_error(file, [Problem(("b", "c"), "bad"), Problem(("b", "new"), "absent"), Problem(("a",), "worse")])
    assert str(error).splitlines()[1:] == ["  a (--set): worse", "  b.new (line 2): absent", "  b.c (line 3): bad"]
    assert str(error).splitlines()[0].endswith("x.yaml: 3 problems")


def test_dumped_text_that_looks_like_a_number_stays_text(write):
    data = {"revision": "12345e6", "rate": 1e-6, "name": "no", "list": ["1e5", 2]}
    assert read_yaml(write(dump_yaml(data))).data == data


def test_a_file_that_contains_itself_is_read(write):
    file = read_yaml(write("a: &x [1, *x]\n"))
    assert file.data["a"][1] is file.data["a"]


# Files that are made to do harm

ANCHORS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
MERGES = "a0: &a0 {k0: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], k{n}: 1}}\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (ANCHORS, "more than 20,000 values, those of anchors counted"),
        (MERGES, "more than 20,000 values, those of anchors counted"),
        ("a: [" + "1, " * 30_000 + "1]\n", "more than 20,000 values"),
        ("a: " + "[" * 400 + "]" * 400 + "\n", "more than 50 deep"),
        ("a: &x [[[[[[1]]]]]]\n" + "b: " + "[" * 45 + "*x" + "]" * 45 + "\n", "more than 50 deep"),
        (f"a: {'1' * 50_000}\n", "line 1 has a value of more than 100 digits"),
        (f"a: 1{':1' * 100_000}\n", "line 1 has a value of more than 100 digits"),
        ("#" * 1_000_001 + "\na: 1\n", "has 1,000,007 bytes; an experiment file has 1,000,000 or fewer"),
        ("a: !!int ''\n", "not valid YAML"),
        ("a: !!bool x\n", "not valid YAML"),
        ("a: !!timestamp x\n", "not valid YAML"),
        ("a: !!python/object/apply:os.system [true]\n", "could not determine a constructor"),
    ],
    ids=["anchors", "merges", "list", "deep", "deep-anchor", "digits", "base60", "bytes", "int", "bool", "time", "tag"],
)  # fmt: skip
def test_a_file_larger_than_an_experiment_is_refused_before_it_fills_the_memory(write, text, problem):
    with pytest.raises(ConfigError, match=problem):
        read_yaml(write(text))


def test_only_a_regular_file_is_read(tmp_path):
    fifo = tmp_path / "fifo.yaml"
    os.mkfifo(fifo)
    for path in (fifo, "/dev/zero"):
        with pytest.raises(ConfigError, match=f"{path}: not a regular file"):
            read_yaml(Path(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)


def test_a_file_with_ordinary_anchors_is_read(write):
    encoders = "".join(f"  - {{<<: *defaults, name: e{number}}}\n" for number in range(200))
    file = read_yaml(
        write(f"defaults: &defaults {{type: dinov2, modes: [linear_probe, fine_tune]}}\nencoders:\n{encoders}")
    )
    assert len(file.data["encoders"]) == 200


@pytest.mark.parametrize("step", ["²", "٣x", "9" * 5000])
def test_an_override_of_a_list_needs_a_small_number(write, step):
    file = with_overrides(read_yaml(write("a: [1]\n")), [f"a.{step}=1"])
    assert ["a is a list of 1, counted from 0" in problem.message for problem in file.problems] == [True]
