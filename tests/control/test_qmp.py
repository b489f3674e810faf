"""QMP as bytes: what is cut out of a stream, what is refused, and that no input gets an exception out of it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmigrate.control import qmp


def cut(*chunks: bytes) -> list[bytes | qmp.QmpError]:
    splitter = qmp.Splitter()
    return [item for chunk in chunks for item in splitter.feed(chunk)]


def texts(*chunks: bytes) -> list[bytes]:
    return [item for item in cut(*chunks) if isinstance(item, bytes)]


def test_messages_need_nothing_between_them() -> None:
    assert cut(b'{"a":1}{"b":2} \r\n{"c":3}') == [b'{"a":1}', b'{"b":2}', b'{"c":3}']


def test_a_message_may_come_byte_by_byte() -> None:
    message = b'{"execute": "x", "arguments": {"s": "}\\"{\\\\", "l": [1, {"k": []}]}}'
    assert cut(*(bytes([byte]) for byte in message)) == [message]


def test_brackets_in_strings_do_not_count() -> None:
    assert cut(b'{"a": "}]{[\'"}', b"{'b': '}\"'}") == [b'{"a": "}]{[\'"}', b"{'b': '}\"'}"]


@pytest.mark.parametrize("stray", [b"\x00", b"\x01", b"\xff"])
def test_a_control_character_resets_the_parser(stray: bytes) -> None:
    first, second = cut(b'{"execute": [{"lost": ' + stray + b'{"execute": "query-name"}')
    assert isinstance(first, qmp.QmpError)
    assert second == b'{"execute": "query-name"}'


def test_text_that_is_no_object_costs_its_line_only() -> None:
    found = cut(b"hello {world}\n", b'{"a":1}')
    assert isinstance(found[0], qmp.QmpError)
    assert found[1:] == [b'{"a":1}']


def test_a_message_over_the_limit_is_refused_and_the_next_is_read() -> None:
    chunk = b"x" * (1 << 16)
    found = cut(b'{"a": "', *[chunk] * 40, b'"}\n{"b":2}')
    assert [type(item) for item in found] == [qmp.QmpError, bytes]
    assert found[1] == b'{"b":2}'


def test_an_endless_message_is_not_kept() -> None:
    splitter = qmp.Splitter()
    list(splitter.feed(b"["))
    for _ in range(100):
        list(splitter.feed(b"1," * (1 << 15)))
    assert len(splitter._pending) <= qmp.MAX_MESSAGE_BYTES + (1 << 17)


def test_nesting_over_the_limit_is_refused() -> None:
    assert texts(b"[" * qmp.MAX_DEPTH + b"]" * qmp.MAX_DEPTH)
    found = cut(b"[" * (qmp.MAX_DEPTH + 1) + b"]" * (qmp.MAX_DEPTH + 1) + b"\n{}")
    assert isinstance(found[0], qmp.QmpError)
    assert found[1:] == [b"{}"]


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_no_bytes_get_an_exception_out_of_the_parser(chunks: list[bytes]) -> None:
    for text in texts(*chunks):
        try:
            qmp.decode_request(text)
        except qmp.QmpError as error:
            assert qmp.encode(qmp.error_reply(error))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.text(max_size=20), st.dictionaries(st.text(max_size=8), JSON, max_size=3), JSON, st.integers(1, 9))
def test_every_request_arrives_as_it_was_sent(
    command: str, arguments: dict[str, object], request_id: object, step: int
) -> None:
    sent = json.dumps({"execute": command, "arguments": arguments, "id": request_id}).encode()
    (text,) = texts(*(sent[at : at + step] for at in range(0, len(sent), step)))
    request = qmp.decode_request(text)
    assert (request.command, request.arguments, request.request_id) == (command, arguments, request_id)
    assert request.reply({}) == {"return": {}, "id": request_id}


def test_single_quotes_are_taken_as_by_qemu() -> None:
    request = qmp.decode_request(b"""{'execute': 'it\\'s "so"', "arguments": {"it's": 'a\\n'}}""")
    assert request.command == 'it\'s "so"'
    assert request.arguments == {"it's": "a\n"}


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"{}",
        b'{"execute": 1}',
        b'{"execute": null}',
        b'{"execute": "x", "arguments": []}',
        b'{"execute": "x", "arguments": null}',
        b'{"execute": "x", "more": 1}',
        b'{"exec-oob": "x"}',
        b'{"execute": NaN}',
        b'{"execute": "\xff"}',
        b'{"execute": ' + b"9" * 5000 + b"}",
        b'{"execute": }',
    ],
)
def test_what_is_no_request_is_a_generic_error(text: bytes) -> None:
    with pytest.raises(qmp.QmpError) as caught:
        qmp.decode_request(text)
    assert caught.value.error_class == "GenericError"
    assert "\n" not in str(caught.value)


def test_an_error_echoes_the_id_as_soon_as_it_is_known() -> None:
    with pytest.raises(qmp.QmpError) as caught:
        qmp.decode_request(b'{"execute": 1, "id": {"n": 5}}')
    assert qmp.error_reply(caught.value)["id"] == {"n": 5}
    assert "id" not in qmp.error_reply(qmp.QmpError("x"))


def test_an_event_has_its_time_and_leaves_empty_data_out() -> None:
    message = qmp.event("STOP")
    assert message.keys() == {"event", "timestamp"}
    assert qmp.event("MIGRATION", {"status": "active"})["data"] == {"status": "active"}
    assert qmp.encode(message).endswith(b"}\r\n")
    assert qmp.encode({"text": "ü"}).isascii()
