"""Requests, nodes, events and failures <-> JSON, by protobuf's own mapping (pure).

Names come out in lowerCamelCase and are read in both spellings; bytes are base64, 64-bit numbers strings. Every
function from JSON raises Malformed with line and column for what is no JSON, with the field's path for what does not
fit the message, and for a request RequestInvalid as well.
"""

import json
import re
from typing import TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import Message

from kiln.build.errors import Malformed
from kiln.build.events import Event, Failure
from kiln.build.model import BuildRequest
from kiln.build.wire import from_request, to_request
from kiln.build.wire_events import from_event, from_failure, to_event, to_failure
from kiln.castore.entry_wire import from_entry, to_entry
from kiln.castore.model import Node
from kiln.protos.kiln.build.v1 import build_pb2 as kiln_pb2
from kiln.protos.snix.build.protos import build_pb2
from kiln.protos.snix.castore.protos import castore_pb2

M = TypeVar("M", bound=Message)
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]*={0,2}")  # Of both alphabets, as the mapping has it.


def request_from_json(text: str | bytes) -> BuildRequest:
    """The request that `text` writes out."""
    return from_request(_parsed(text, build_pb2.BuildRequest()))


def request_to_json(request: BuildRequest) -> dict[str, object]:
    """`request` as a JSON object."""
    return MessageToDict(to_request(request))


def entry_from_json(text: str | bytes) -> tuple[bytes, Node]:
    """The name (perhaps empty) and node that `text` writes out. Raises EntryUnset and its like too."""
    return from_entry(_parsed(text, castore_pb2.Entry()))


def entry_to_json(name: bytes, node: Node) -> dict[str, object]:
    """`node` under `name` (empty: none) as a JSON object."""
    return MessageToDict(to_entry(name, node))


def event_from_json(text: str | bytes) -> Event | None:
    """The event that `text` writes out; None if it is of a kind unknown here."""
    # Events grow: fields that are new here are no error.
    return from_event(_parsed(text, kiln_pb2.Event(), ignore_unknown=True))


def event_to_json(event: Event) -> dict[str, object]:
    """`event` as a JSON object."""
    return MessageToDict(to_event(event))


def failure_from_json(text: str | bytes) -> Failure:
    """The failure that `text` writes out."""
    return from_failure(_parsed(text, kiln_pb2.Failure(), ignore_unknown=True))


def failure_to_json(failure: Failure) -> dict[str, object]:
    """`failure` as a JSON object."""
    return MessageToDict(to_failure(failure))


def _parsed(text: str | bytes, message: M, *, ignore_unknown: bool = False) -> M:
    what = message.DESCRIPTOR.full_name
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise Malformed(what, error.msg, line=error.lineno, column=error.colno) from error
    except _RepeatedNameError as error:
        raise Malformed(what, f"the name {json.dumps(error.args[0])} stands twice in one object") from error
    except UnicodeDecodeError as error:
        raise Malformed(what, f"byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise Malformed(what, "it is nested too deeply") from error
    except ValueError as error:  # An integer of more digits than Python reads.
        raise Malformed(what, str(error)) from error
    if not isinstance(value, dict):
        raise Malformed(what, "it is no JSON object")
    descriptor: Descriptor = message.DESCRIPTOR  # type: ignore[assignment]  # The stubs do not know that upb's is one.
    _check_object(what, "", value, descriptor)
    try:
        return ParseDict(value, message, ignore_unknown_fields=ignore_unknown)
    except ParseError as error:
        raise Malformed(what, " ".join(str(error).split()).rstrip(".")) from error


def _check_object(what: str, path: str, value: dict[str, object], message: Descriptor) -> None:
    """Refuse what json_format lets pass: one field under both its names, and base64 with other characters in it.

    It leaves such characters out and decodes the rest: another value than the one that was meant.
    """
    seen: set[str] = set()
    for name, given in value.items():
        field = message.fields_by_name.get(name) or message.fields_by_camelcase_name.get(name)
        if field is None:
            continue
        if field.name in seen:
            raise Malformed(what, f"{path}{field.name} stands twice in one object")
        seen.add(field.name)
        for index, item in enumerate(given if isinstance(given, list) else [given]):
            where = f"{path}{field.name}[{index}]" if isinstance(given, list) else path + field.name
            if field.type == FieldDescriptor.TYPE_BYTES and isinstance(item, str) and not _BASE64.fullmatch(item):
                raise Malformed(what, f"{where} is not base64")
            if field.message_type is not None and isinstance(item, dict):
                _check_object(what, f"{where}.", item, field.message_type)


class _RepeatedNameError(ValueError):
    """One object has a name twice."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise _RepeatedNameError(name)
        found[name] = value
    return found
