"""A client of the Control API for tests: every answer is held against the published contract and against the program's own document."""
from __future__ import annotations

import http.client
import json
import re
from typing import Any, NamedTuple

import jsonschema

import telemt
import telemt_api as api
from tests.cases import load_vector

CONTRACT = load_vector("openapi")
OWN = api.make_openapi(telemt.VERSION)
ENVELOPE = "application/json; charset=utf-8"


def closed(schema: Any) -> Any:
    """A schema that admits no member it does not name: what is served and not documented is found."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    return found | {"additionalProperties": False} if schema.get("type") == "object" and "properties" in schema else found


STRICT = closed(OWN)


def schema_at(document: dict[str, Any], method: str, path: str, status: int) -> dict[str, Any] | None:
    """The schema of an answer in an OpenAPI document, with what it refers to; None for a route that the document lacks."""
    for template, methods in document["paths"].items():
        if method.lower() in methods and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path):
            answers = methods[method.lower()]["responses"]
            answer = answers.get(str(status), answers["default"])
            if "$ref" in answer:
                answer = document["components"]["responses"][answer["$ref"].rpartition("/")[2]]
            return {**answer["content"][ENVELOPE]["schema"], "components": document["components"]}
    return None


class Reply(NamedTuple):
    """One answer, parsed."""

    status: int
    fields: dict[str, str]
    body: Any

    @property
    def data(self) -> Any:
        assert self.body["ok"] is True, self.body
        return self.body["data"]

    @property
    def error(self) -> tuple[int, str, str]:
        return self.status, self.body["error"]["code"], self.body["error"]["message"]


class ApiClient:
    """Requests over one kept connection."""

    def __init__(self, port: int, **fields: str) -> None:
        self.port, self.fields = port, fields
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def call(self, method: str, path: str, body: object = None, **fields: str) -> Reply:
        """Ask; the answer has been checked."""
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        names = {name.replace("_", "-"): value for name, value in (self.fields | fields).items()}
        self._connection.request(method, path, raw, names)
        answer = self._connection.getresponse()
        text = answer.read()
        reply = Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, json.loads(text) if text else None)
        self.check(method, path, reply, text)
        return reply

    def check(self, method: str, path: str, reply: Reply, text: bytes) -> None:
        """Fields of section 3, one line of compact JSON, and the schemas of both documents."""
        assert reply.fields["content-type"] == ENVELOPE
        assert reply.fields["cache-control"] == "no-store" and reply.fields["x-content-type-options"] == "nosniff"
        assert "date" in reply.fields and "server" not in reply.fields and "transfer-encoding" not in reply.fields
        assert not {"location", "www-authenticate", "etag"} & set(reply.fields)
        assert not [name for name in reply.fields if name.startswith("access-control")]
        if method == "HEAD":
            assert text == b"" and int(reply.fields["content-length"]) > 0
            return
        assert len(text) == int(reply.fields["content-length"])
        assert text.decode() == json.dumps(reply.body, separators=(",", ":"), ensure_ascii=False) or b"." in text
        assert b"\n" not in text
        pure = re.sub("/+$", "", path.partition("?")[0])
        known = 0
        for document in (CONTRACT, STRICT):
            schema = schema_at(document, method, pure, reply.status)
            if schema is not None:
                known += 1
                jsonschema.Draft202012Validator(schema).validate(reply.body)
        if not known:                                   # not a route: an error all the same
            error = {**api.schema_of("ErrorEnvelope"), "components": STRICT["components"]}
            jsonschema.Draft202012Validator(error).validate(reply.body)

    def get(self, path: str, **fields: str) -> Any:
        """`data` of a read that succeeds."""
        reply = self.call("GET", path, **fields)
        assert reply.status == 200, reply
        return reply.data

    def close(self) -> None:
        self._connection.close()
