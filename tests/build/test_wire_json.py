"""What is no JSON, or not the JSON that it should be, is refused with the place."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiln.build.errors import Malformed, RequestInvalid
from kiln.build.wire_json import (
    entry_from_json,
    entry_to_json,
    event_from_json,
    failure_from_json,
    request_from_json,
)
from kiln.castore.entry_wire import EntryUnset
from kiln.castore.model import Digest, FileNode
from kiln.errors import Invalid


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"command_args": ["x"],\n  "outputs": [}', "line 2 column 15"),
        ("", "line 1 column 1"),
        ("[]", "no JSON object"),
        ("null", "no JSON object"),
        ('{"command": ["x"]}', 'no field named "command"'),
        ('{"command_args": "x"}', "command_args"),
        ('{"constraints": {"min_memory": -1}}', "constraints field: .*min_memory field: .*-1$"),
        ('{"inputs": [{}, {"file": {"digest": "?"}}]}', r"inputs\[1\].file.digest"),
        ('{"inputs_dir": "a", "inputs_dir": "b"}', '"inputs_dir" stands twice'),
        ('{"inputs_dir": "a", "inputsDir": "b"}', "inputs_dir stands twice"),
        (b'{"inputs_dir": "\xff"}', "UTF-8"),
        ('{"inputs_dir": "\\ud800"}', "inputs_dir"),
        ('{"constraints": {"min_memory": ' + "9" * 5000 + "}}", "digits"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_malformed_request_is_refused_with_the_place(text: str | bytes, says: str) -> None:
    with pytest.raises(Malformed, match=says) as caught:
        request_from_json(text)
    assert str(caught.value).startswith("not a snix.build.v1.BuildRequest")
    assert str(caught.value).isprintable()


def test_a_request_that_breaks_a_rule_is_refused_by_its_name() -> None:
    with pytest.raises(RequestInvalid) as caught:
        request_from_json('{"command_args": ["x"], "outputs": ["elsewhere"]}')
    assert caught.value.rule == "output-outside-scratch"


def test_both_spellings_of_a_field_are_read() -> None:
    one, other = '{"command_args": ["x"], "working_dir": "tmp"}', '{"commandArgs": ["x"], "workingDir": "tmp"}'
    assert request_from_json(one) == request_from_json(other)


def test_a_node_in_text_is_the_json_of_its_entry() -> None:
    node = FileNode(Digest(bytes(32)), 2**40, executable=True)
    written = {"file": {"name": "YQ==", "digest": "A" * 43 + "=", "size": "1099511627776", "executable": True}}
    assert entry_to_json(b"a", node) == written
    assert entry_from_json(json.dumps(written)) == (b"a", node)
    with pytest.raises(EntryUnset):
        entry_from_json("{}")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)
NAMES = [
    "inputs",
    "constraints",
    "file",
    "seq",
    "time",
    "finished",
    "usage",
    "wall",
    "reason",
    "detail",
    "spans",
    "size",
]


@given(st.recursive(values, lambda inner: st.dictionaries(st.sampled_from(NAMES), inner, max_size=3), max_leaves=6))
def test_any_json_is_taken_or_refused_as_invalid(value: object) -> None:
    for parse in (request_from_json, entry_from_json, event_from_json, failure_from_json):
        with suppress(Invalid):
            parse(json.dumps(value))
