"""The answers of the metadata service, requirement by requirement; see docs/scheduled-events.md for the list."""

from __future__ import annotations

import email.utils
import json
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.events.samples import EVENT, ID, NOW, OTHER
from vmferry.events import document, instance, policy, protocol, states
from vmferry.events.states import Board, EventStatus

EVENTS = "/metadata/scheduledevents"
HEADERS = {"metadata": "true"}


def view(board: Board, *others: Board, name: str = "WestNO_0") -> protocol.View:
    """What a machine of this name is shown."""
    array = document.content([event for one in (board, *others) for event in one.events])
    board = states.shown(board, array)
    return protocol.View(
        board,
        others,
        document.document(board.incarnation, array),
        instance.Instance(name, "0d1b6a9e-9a54-4d0c-8f4e-0a1c7c6f2b11", ("52:54:00:aa:bb:cc",), "web"),
    )


def ask(
    method: str = "GET",
    path: str = EVENTS,
    version: str = "2020-07-01",
    *,
    shown: protocol.View | None = None,
    body: bytes = b"",
    **headers: str,
) -> protocol.Answer:
    """The answer to a request."""
    query = [("api-version", version)] if version else []
    given = HEADERS | {name.replace("_", "-"): value for name, value in headers.items()}
    return protocol.answer(
        protocol.Request(method, path, query, given, body), shown or view(states.scheduled(Board(), EVENT))
    )


def acknowledge(*ids: object, **more: Any) -> bytes:
    """The body of an acknowledgement."""
    return json.dumps({"StartRequests": [{"EventId": one} for one in ids], **more}).encode()


def test_se_11_12_13_15_the_document_byte_for_byte() -> None:
    """Every member, in Azure's spelling and order, with integers where Azure has them and the right weekday."""
    found = ask().response
    assert (found.status, found.content_type) == (200, "application/json")
    assert found.body == (
        b'{"DocumentIncarnation":1,"Events":[{"EventId":"C7061BAC-AFDC-4513-B24B-AA5F13A16123",'
        b'"EventStatus":"Scheduled","EventType":"Freeze","ResourceType":"VirtualMachine","Resources":["WestNO_0"],'
        b'"NotBefore":"Thu, 28 May 2026 20:41:40 GMT","Description":"Virtual machine is being paused because of a '
        b'memory-preserving Live Migration operation.","EventSource":"Platform","DurationInSeconds":5}]}'
    )


def test_se_11_an_empty_document_is_whole() -> None:
    """Both members are there, and the array is empty rather than null."""
    assert ask(shown=view(Board())).response.body == b'{"DocumentIncarnation":1,"Events":[]}'


@pytest.mark.parametrize("day", range(0, 366, 13))
def test_se_13_dates_are_what_other_parsers_read(day: int) -> None:
    """A parser of mail dates reads back the instant; every weekday and month comes up."""
    at = NOW + day * 86400.25
    text = document.http_date(at)
    assert email.utils.parsedate_to_datetime(text).timestamp() == int(at)
    assert text == email.utils.formatdate(int(at), usegmt=True)


def test_se_14_a_started_event_has_no_date() -> None:
    """The member is there, and empty."""
    board = states.started(states.scheduled(Board(), EVENT), ID, NOW + 900)
    (event,) = json.loads(ask(shown=view(board)).response.body)["Events"]
    assert (event["EventStatus"], event["NotBefore"]) == ("Started", "")


@pytest.mark.parametrize("value", ["true", "True", "TRUE", " true "])
def test_se_30_the_metadata_header_in_any_case(value: str) -> None:
    """Its value is compared without regard to case."""
    assert ask(metadata=value).response.status == 200


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
@pytest.mark.parametrize("value", ["false", "", "1"])
def test_without_the_metadata_header_nothing_is_answered(method: str, value: str) -> None:
    """On reads and on acknowledgements alike, with the text that is known for it."""
    found = ask(method, metadata=value, body=acknowledge(ID))
    assert (found.response.status, found.approves) == (400, ())
    assert "Required metadata header not specified" in json.loads(found.response.body)["error"]


def test_se_29_what_came_through_a_proxy_is_refused() -> None:
    """By the header that proxies add, whatever it says."""
    found = ask("POST", x_forwarded_for="", body=acknowledge(ID))
    assert (found.response.status, found.approves) == (400, ())


def test_a_parameter_that_is_there_twice_is_refused() -> None:
    """Even if both say the same, in whatever case."""
    for second in ("api-version", "Api-Version"):
        request = protocol.Request(
            "GET", EVENTS, [("api-version", "2020-07-01"), (second, "2020-07-01")], HEADERS
        )
        assert protocol.answer(request, view(Board())).response.status == 400


@pytest.mark.parametrize("version", ["", "{latest}", "latest", "2030-01-01", "2020-7-1", "1"])
@pytest.mark.parametrize(
    ("method", "path"), [("GET", EVENTS), ("POST", EVENTS), ("GET", "/metadata/instance")]
)
def test_an_unknown_version_is_refused_as_documented(version: str, method: str, path: str) -> None:
    """Byte for byte what Azure answers."""
    found = ask(method, path, version, body=acknowledge(ID))
    assert (found.response.status, found.approves) == (400, ())
    assert found.response.body == (
        b'{"error":"Bad request. api-version is invalid or was not specified in the request. For more information '
        b'refer to aka.ms/azureimds","newest-versions":["2025-04-07","2024-07-17","2024-03-15"]}'
    )


@pytest.mark.parametrize("version", protocol.EVENT_VERSIONS)
def test_se_3_every_version_of_the_table_reads_and_acknowledges(version: str) -> None:
    """An identity that was read under any version can be acknowledged under any other."""
    assert ask(version=version).response == ask().response
    found = ask("POST", version=version, body=acknowledge(ID))
    assert (found.response.status, found.approves) == (200, [ID])


def test_the_newest_versions_that_an_error_names_are_answered() -> None:
    """A client that follows the error's advice is served."""
    for version in json.loads(ask(version="").response.body)["newest-versions"]:
        assert ask(version=version).response.status == 200


@pytest.mark.parametrize(
    "content_type", [None, "application/json", "application/x-www-form-urlencoded", "text/plain"]
)
def test_se_2_bodies_are_json_whatever_they_are_called(content_type: str | None) -> None:
    """The documentation's own samples send none, and that of a form; Accept never changes anything."""
    headers = {"content_type": content_type} if content_type else {}
    found = ask("POST", body=acknowledge(ID), accept="text/html", **headers)
    assert (found.response.status, found.approves) == (200, [ID])
    assert ask(**headers).response == ask().response


def test_se_4_other_members_are_ignored() -> None:
    """The first preview sent the document's number along."""
    assert ask("POST", body=acknowledge(ID, DocumentIncarnation=7)).approves == [ID]


def test_se_5_every_identity_of_a_body_counts() -> None:
    """A stale one does not spoil the others."""
    board = states.scheduled(states.scheduled(Board(), EVENT), replace(EVENT, id=OTHER))
    found = ask("POST", shown=view(board), body=acknowledge("stale", ID, OTHER))
    assert (found.response.status, found.approves) == (200, [ID, OTHER])


def test_se_6_an_acknowledgement_ignores_conditions() -> None:
    """A sample of Azure's sends the current ETag with it."""
    tag = ask().response.headers["ETag"]
    found = ask("POST", body=acknowledge(ID), if_none_match=tag, if_match='"other"')
    assert (found.response.status, found.approves) == (200, [ID])


def test_se_7_8_an_acknowledgement_answers_200_with_the_document() -> None:
    """JSON as a client expects that reads any body, and as Azure's mock server answers."""
    assert ask("POST", body=acknowledge(ID)).response.body == ask().response.body


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"StartRequests":null}',
        b'{"StartRequests":{"EventId":"x"}}',
        b'{"StartRequests":[]}',
        b'{"StartRequests":["x"]}',
        b'{"StartRequests":[{}]}',
        b'{"StartRequests":[{"EventId":7}]}',
        b'{"StartRequests":[{"EventId":"11111111-AAAA-4513-B24B-AA5F13A16123"}]}',
        b"\xff\xfe",
        b"[" * 60_000,
        b'{"StartRequests":[{"EventId":"%s"}]%s}' % (ID.encode(), b" " * protocol.MAX_BODY_BYTES),
    ],
)
def test_se_9_what_makes_no_sense_is_refused_each_time_alike(body: bytes) -> None:
    """400 with a small JSON body and no effect, however often it is repeated."""
    first = ask("POST", body=body)
    assert (first.response.status, first.approves) == (400, ())
    assert len(first.response.body) < 200
    assert json.loads(first.response.body)["error"]
    assert ask("POST", body=body) == first


def test_se_19_26_an_identity_is_acknowledged_late_and_again() -> None:
    """After the start and after the end the answer is 200, in whatever case the identity is spelt."""
    board = states.scheduled(Board(), EVENT)
    for after in (board, states.started(board, ID, NOW + 900), states.ended(board, ID, NOW)):
        for spelt in (ID, ID.lower()):
            assert ask("POST", shown=view(after), body=acknowledge(spelt)).response.status == 200


def test_se_16_17_18_the_instance_document() -> None:
    """Its name is the one in events, every primitive is a string, and both identities are there."""
    found = ask(path="/metadata/instance", version="2021-12-13").response
    said = json.loads(found.body)
    compute = said["compute"]
    assert compute["name"] == "WestNO_0"
    assert compute["vmId"] == "0d1b6a9e-9a54-4d0c-8f4e-0a1c7c6f2b11"
    for name in (
        "location", "offer", "osType", "placementGroupId", "platformFaultDomain", "platformUpdateDomain",
        "publisher", "resourceGroupName", "sku", "subscriptionId", "tags", "version", "vmSize",
    ):  # fmt: skip
        assert isinstance(compute[name], str), name
    assert said["network"]["interface"][0]["macAddress"] == "525400AABBCC"
    for version in ("2019-08-01", "2020-09-01", "2021-08-01", "2025-04-07"):
        assert ask(path="/metadata/instance", version=version).response == found


def test_elements_of_the_instance_document() -> None:
    """Path elements filter it; a leaf as text is the bare value; what is not there is 404."""
    query = [("api-version", "2021-12-13"), ("format", "text")]
    request = protocol.Request("GET", "/metadata/instance/compute/name", query, HEADERS)
    found = protocol.answer(request, view(Board())).response
    assert (found.body, found.content_type) == (b"WestNO_0", "text/plain")
    compute = ask(path="/metadata/instance/compute").response
    assert json.loads(compute.body) == json.loads(ask(path="/metadata/instance").response.body)["compute"]
    first = ask(path="/metadata/instance/network/interface/0").response
    assert json.loads(first.body)["macAddress"] == "525400AABBCC"
    for path in ("compute/nothing", "network/interface/1", "network/interface/x", "compute/name/x"):
        assert ask(path=f"/metadata/instance/{path}").response.status == 404


def test_versions_need_no_version() -> None:
    """The only resource without one; but the header is needed."""
    found = ask(path="/metadata/versions", version="").response
    assert json.loads(found.body)["apiVersions"] == list(protocol.VERSIONS)
    request = protocol.Request("GET", "/metadata/versions")
    assert protocol.answer(request, view(Board())).response.status == 400


@pytest.mark.parametrize(
    "path", ["/", "/metadata", "/metadata/", "/metadata/attested", "/scheduledevents", EVENTS + "/x"]
)
def test_what_does_not_exist_is_404(path: str) -> None:
    """With a JSON body."""
    found = ask(path=path).response
    assert (found.status, json.loads(found.body)) == (404, {"error": "Not found"})


@pytest.mark.parametrize("path", [EVENTS + "/", "/metadata//scheduledevents", "/Metadata/ScheduledEvents"])
def test_spellings_of_the_path(path: str) -> None:
    """A slash more, and capitals, are as good."""
    assert ask(path=path).response == ask().response


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_405(method: str) -> None:
    """And say which there are."""
    found = ask(method).response
    assert (found.status, found.headers["Allow"]) == (405, "GET, HEAD, POST")
    assert ask("POST", "/metadata/instance").response.status == 405


def test_se_22_etags() -> None:
    """The same document has the same ETag and answers 304 without a body; anything else gets the document."""
    first = ask().response
    tag = first.headers["ETag"]
    again = ask(if_none_match=tag).response
    assert (again.status, again.body, again.headers["ETag"]) == (304, b"", tag)
    for nonsense in ("0", "null", "", tag.strip('"'), "W/" + tag, "*", tag + " "):
        found = ask(if_none_match=nonsense).response
        assert (found.status, found.body) == (200, first.body), nonsense
    started = states.started(states.scheduled(Board(), EVENT), ID, NOW + 900)
    other = ask(shown=view(started), if_none_match=tag).response
    assert other.status == 200
    assert other.headers["ETag"] not in (tag, "0", '"0"')


def test_the_rate_limit_counts_any_second() -> None:
    """Five within any second, then 429 until the first of them is a second old; refused ones do not count."""
    limit = policy.RateLimit(5)
    assert [limit.admits(10 + step / 10) for step in range(7)] == [True] * 5 + [False] * 2
    assert not limit.admits(10.99)
    assert limit.admits(11.0)
    assert not limit.admits(11.05)
    assert limit.admits(11.1)
    found = protocol.too_many()
    assert (found.status, found.headers["Retry-After"]) == (429, "1")
    assert json.loads(found.body)["error"]


def test_a_member_of_the_set_sees_and_acknowledges() -> None:
    """An event of another machine of the set is listed and its identity is valid."""
    other = states.scheduled(Board(), EVENT)
    shown = view(Board(), other, name="WestNO_1")
    (event,) = json.loads(ask(shown=shown).response.body)["Events"]
    assert event["Resources"] == ["WestNO_0"]
    assert ask("POST", shown=shown, body=acknowledge(ID)).response.status == 200


def test_what_is_sent_is_ascii_json_of_strings_and_integers() -> None:
    """Names and descriptions cannot break a document."""
    strange = replace(EVENT, description='"quoted" \\ ü\n', duration_s=-1)
    body = ask(shown=view(states.scheduled(Board(), strange))).response.body
    body.decode("ascii")
    (event,) = json.loads(body)["Events"]
    assert event["Description"] == '"quoted" \\ ü\n'
    assert {name: type(value) for name, value in event.items() if type(value) is not str} == {
        "Resources": list,
        "DurationInSeconds": int,
    }
    assert event["EventStatus"] == EventStatus.SCHEDULED
