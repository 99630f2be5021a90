"""Any file at all is either an experiment or a ConfigError; nothing else is raised."""

import os
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raysweep.errors import ConfigError
from raysweep.experiment.config import Experiment, experiment_schema, load_experiment, resolved_yaml

EXPERIMENTS = sorted((Path(__file__).parents[2] / "experiments").glob("*.yaml"))
TEXTS = [path.read_text() for path in EXPERIMENTS]


def _names(node):
    if isinstance(node, dict):
        for key, value in node.items():
            yield from ([key] if isinstance(key, str) else [])
            yield from _names(value)
    elif isinstance(node, list):
        for value in node:
            yield from _names(value)
    elif isinstance(node, str) and len(node) < 40:
        yield node


# The words of experiment files: random text would never get past the first key.
WORDS = sorted({*_names(experiment_schema()), *(name for text in TEXTS for name in _names(yaml.safe_load(text)))})

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(WORDS),
    st.integers(min_value=10**30), st.sampled_from(["s3://a:b@c/d", "", " ", "../..", "1e400", "all", "auto"]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS) | scalars, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def changed_experiments(draw):
    """An experiment of the repository in which one to three values are replaced, removed or added."""
    data = yaml.safe_load(draw(st.sampled_from(TEXTS)))
    for _ in range(draw(st.integers(1, 3))):
        node = data
        while children := [child for child in _children(node) if isinstance(child, dict | list) and child]:
            if draw(st.booleans()):
                break
            node = draw(st.sampled_from(children))
        if isinstance(node, list):
            node[draw(st.integers(0, len(node) - 1))] = draw(values)
        elif draw(st.booleans()):
            node[draw(st.sampled_from(WORDS))] = draw(values)
        else:
            node[draw(st.sampled_from(list(node)))] = draw(values)
    return yaml.dump(data, allow_unicode=True)


def _children(node):
    return list(node.values()) if isinstance(node, dict) else node


@st.composite
def changed_texts(draw):
    """The text of an experiment with pieces cut out, doubled or put in."""
    text = draw(st.sampled_from(TEXTS))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 30)))
        piece = draw(
            st.sampled_from([":", "- ", "\n", "\t", "&a ", "*a", "<<: ", "{", "}", "[", "]", "'", '"', "!!int ", "? "])
            | st.text(max_size=5) | st.just(text[start:end] * 2)
        )  # fmt: skip
        text = text[:start] + piece + text[end:]
    return text


def loads(path: Path, content: bytes) -> bool:
    """Tells whether a file with this content loads; what loads has to load again from its resolved form."""
    path.write_bytes(content)
    try:
        experiment = load_experiment(path)
    except ConfigError:
        return False
    assert isinstance(experiment, Experiment)
    path.write_text(resolved_yaml(experiment))
    assert load_experiment(path) == experiment
    return True


NUM_EXAMPLES = int(os.environ.get("RAYSWEEP_FUZZ_EXAMPLES", "60"))  # make fuzz takes 10,000


@pytest.mark.parametrize("strategy", ["values", "texts", "bytes"])
def test_any_file_is_an_experiment_or_a_config_error(tmp_path, strategy):
    contents = {
        "values": changed_experiments().map(lambda text: text.encode(errors="surrogatepass")),
        "texts": changed_texts().map(lambda text: text.encode(errors="surrogatepass")),
        "bytes": st.binary(max_size=200),
    }[strategy]

    @settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(contents)
    def run(content):
        loads(tmp_path / "x.yaml", content)  # any error but ConfigError, and another experiment the second time, fail

    assert loads(tmp_path / "x.yaml", TEXTS[0].encode())
    run()


def test_any_override_is_taken_or_a_config_error(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(TEXTS[0])
    keys = st.lists(st.sampled_from(WORDS) | st.integers(0, 3).map(str) | st.text(max_size=3), min_size=1, max_size=4)

    @settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(keys, values.map(str) | st.text(max_size=20) | st.sampled_from(WORDS))
    def run(key, value):
        with suppress(ConfigError):
            assert isinstance(load_experiment(path, [f"{'.'.join(key)}={value}"]), Experiment)

    assert load_experiment(path, ["seed=7"]).seed == 7
    run()
