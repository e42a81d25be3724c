"""Room 6 of telemt_api: routing rules of api.md 5, and the OpenAPI document against the published contract."""
from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest

import telemt
import telemt_api as api
from telemt_api import ApiError, find_route, make_openapi, path_of
from tests.cases import load_vector

CONTRACT = load_vector("openapi")
OWN = make_openapi(telemt.VERSION)
PAGES = {(method, path) for method in ("get", "head") for path in ("/", "/ui")}


@pytest.mark.parametrize(("method", "target", "name", "user"), [
    ("GET", "/v1/health", "get_health", ""), ("GET", "/v1/health/", "get_health", ""), ("GET", "/v1/health//?x=1#y", "get_health", ""),
    ("GET", "http://host:1/v1/health?x", "get_health", ""), ("GET", "/v1/users/", "get_users", ""),
    ("POST", "/v1/users///", "create_user", ""), ("GET", "/v1/users/bob", "get_user", "bob"), ("GET", "/v1/users/bob/", "get_user", "bob"),
    ("PATCH", "/v1/users/b%6Fb", "patch_user", "bob"), ("DELETE", "/v1/users/%C3%A4%20b", "delete_user", "ä b"),
    ("POST", "/v1/users/bob/rotate-secret", "rotate_secret", "bob"), ("POST", "/v1/users/bob/enable/", "enable_user", "bob"),
    ("POST", "/v1/users/b+b/disable", "disable_user", "b+b"), ("POST", "/v1/users/./reset-quota", "reset_quota", "."),
    ("GET", "/v1/users/rotate-secret", "get_user", "rotate-secret"), ("GET", "/v1/runtime/me-quality", "get_me_quality", ""),
    ("GET", "/v1/users/bob/qr?kind=tls", "get_qr", "bob")])
def test_found(method: str, target: str, name: str, user: str) -> None:
    route, found = find_route(method, path_of(target))
    assert (route.name, found) == (name, user)


@pytest.mark.parametrize(("method", "target"), [
    ("GET", "/"), ("GET", "/ui"), ("GET", "//"), ("GET", "/v1"), ("GET", "/v1/nothing"), ("GET", "/V1/health"), ("GET", "//v1/health"),
    ("GET", "/v1//health"), ("GET", "/v1/./health"), ("GET", "/v1/%68ealth"), ("POST", "/v1/health"), ("HEAD", "/v1/health"),
    ("DELETE", "/v1/users"), ("OPTIONS", "/v1/users"), ("POST", "/v1/users/bob"), ("GET", "/v1/users/bob/rotate-secret"),
    ("PUT", "/v1/users/bob/enable"), ("POST", "/v1/users/bob/enable/x"), ("POST", "/v1/users/bob/Enable"), ("POST", "/v1/users//enable"),
    ("GET", "/v1/users//bob"), ("GET", "*"), ("OPTIONS", "*"), ("GET", "v1/health"), ("POST", "/v1/users/bob/qr"),
    ("get", "/v1/health"), ("HEAD", "/v1/openapi.json"), ("POST", "/v1/stats/users/quota")])
def test_not_found(method: str, target: str) -> None:
    with pytest.raises(ApiError) as caught:
        find_route(method, path_of(target))
    assert (caught.value.status, caught.value.code, caught.value.message) == (404, "not_found", "Route not found")


@pytest.mark.parametrize("method", ["PUT", "HEAD", "OPTIONS", "TRACE", "CONNECT", "FOO"])
def test_other_methods_on_one_user_are_405(method: str) -> None:
    with pytest.raises(ApiError) as caught:
        find_route(method, "/v1/users/bob")
    assert (caught.value.status, caught.value.code) == (405, "method_not_allowed")
    assert caught.value.message == "Unsupported HTTP method for this route"


@pytest.mark.parametrize("segment", ["%ff", "%2F", "a%2fb", "%00", "%0A", "%7f", "%C2%85", "%", "%4", "%zz", "%C3"])
def test_a_name_that_is_none_is_nobody(segment: str) -> None:
    assert find_route("GET", f"/v1/users/{segment}")[1] == api.NOBODY


@pytest.mark.parametrize(("target", "limit"), [
    ("/x", 50), ("/x?limit=7", 7), ("/x?limit=0", 1), ("/x?limit=5000", 1000), ("/x?limit=" + "9" * 5000, 1000), ("/x?limit=-1", 50),
    ("/x?limit=a", 50), ("/x?limit=", 50), ("/x?other=1&limit=3&limit=9", 3), ("/x?%6Cimit=3", 3), ("/x?limit=3#&limit=4", 3),
    ("/x?%&limit=2", 2)])
def test_limit_of_events(target: str, limit: int) -> None:
    assert api.events_limit(target) == limit


@pytest.mark.parametrize(("query", "wanted"), [
    ("", ("tls", 0)), ("?kind=classic&index=7", ("classic", 7)), ("?kind=secure&kind=no", ("secure", 0)), ("?index=0009", ("tls", 9)),
    ("?%6bind=tls_domains&x=y", ("tls_domains", 0)), ("?index=%31", ("tls", 1))])
def test_wanted_link(query: str, wanted: tuple[str, int]) -> None:
    assert api.wanted_link(f"/x{query}") == wanted


@pytest.mark.parametrize(("query", "message"), [
    ("?kind=TLS", "kind must be one of tls, tls_domains, secure, classic"),
    ("?kind=", "kind must be one of tls, tls_domains, secure, classic"),
    ("?kind=x&index=x", "kind must be one of tls, tls_domains, secure, classic"), ("?index=", "index must be within [0, 9999]"),
    ("?index=10000", "index must be within [0, 9999]"), ("?index=-1", "index must be within [0, 9999]"),
    ("?index=+1", "index must be within [0, 9999]"), ("?index=%D9%A1", "index must be within [0, 9999]")])
def test_wanted_link_that_is_none(query: str, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        api.wanted_link(f"/x{query}")
    assert (caught.value.status, caught.value.code, caught.value.message) == (400, "bad_request", message)


# -- the document ------------------------------------------------------------------------------------------------------------------

def test_the_document_is_openapi() -> None:
    assert OWN["openapi"] == "3.1.0" and OWN["info"]["version"] == telemt.VERSION
    ids = [operation["operationId"] for methods in OWN["paths"].values() for operation in methods.values()]
    assert len(ids) == len(set(ids)) == len(api.ROUTES) + len(PAGES)


def test_every_reference_leads_somewhere() -> None:
    wanted = set(re.findall(r"'#/components/schemas/(\w+)'", str(OWN)))
    assert wanted <= set(OWN["components"]["schemas"])
    assert set(OWN["components"]["schemas"]) == wanted


def test_every_schema_is_a_json_schema() -> None:
    for schema in OWN["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_every_documented_request_of_the_contract_exists() -> None:
    theirs = {(method, path) for path, methods in CONTRACT["paths"].items() for method in methods}
    assert theirs <= {(route.method.lower(), route.path) for route in api.ROUTES} | PAGES
    assert theirs <= {(method, path) for path, methods in OWN["paths"].items() for method in methods}


def test_operations_are_those_of_the_contract() -> None:
    """Generated clients name their methods after operationId and fill in the parameters."""
    def names(document: dict[str, Any], operation: dict[str, Any]) -> set[str]:
        given = [document["components"]["parameters"][item["$ref"].rpartition("/")[2]] if "$ref" in item else item
                 for item in operation.get("parameters", ())]
        return {item["in"] + " " + item["name"] for item in given}

    for path, methods in CONTRACT["paths"].items():
        for method, operation in methods.items():
            ours = OWN["paths"][path][method]
            assert ours["operationId"] == operation["operationId"]
            assert names(OWN, ours) == names(CONTRACT, operation), (method, path)
            assert ours.get("security") == operation.get("security")
            body = operation.get("requestBody", {"required": None})
            if ours.get("requestBody", {"required": None})["required"] != body.get("required", False):
                assert "requestBody" not in ours and body.get("required", False) is False       # read and thrown away


def test_status_codes_are_those_of_the_contract() -> None:
    for path, methods in CONTRACT["paths"].items():
        for method, operation in methods.items():
            ours = set(OWN["paths"][path][method]["responses"])
            assert ours == set(operation["responses"]), (method, path)
            assert {code for code in ours if code[0] == "2"} == {code for code in operation["responses"] if code[0] == "2"}


def resolved(schema: Any, document: dict[str, Any]) -> Any:
    """A schema with its references put in."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return resolved(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]], document)
        return {key: resolved(value, document) for key, value in schema.items()}
    return [resolved(item, document) for item in schema] if isinstance(schema, list) else schema


def shape(schema: Any, path: str) -> dict[str, tuple[Any, ...]]:
    """member path -> (type, enum); arrays and objects are walked into."""
    found: dict[str, tuple[Any, ...]] = {}
    if "oneOf" in schema:                                 # Secret or null
        schema = {**schema["oneOf"][0], "type": ["string", "null"]}
    kind = schema.get("type")
    found[path] = (kind, schema.get("enum"), schema.get("const"), schema.get("pattern") if path != "/data/enabled" else None)
    for name, member in schema.get("properties", {}).items():
        found |= shape(member, f"{path}/{name}")
    if "items" in schema:
        found |= shape(schema["items"], f"{path}[]")
    return found


COMMON = sorted(set(CONTRACT["components"]["schemas"]) & set(api.SHAPES))


@pytest.mark.parametrize("name", COMMON)
def test_a_shape_is_that_of_the_contract(name: str) -> None:
    theirs = resolved(CONTRACT["components"]["schemas"][name], CONTRACT)
    ours = resolved(OWN["components"]["schemas"][name], OWN)
    found, wanted = shape(ours, ""), shape(theirs, "")
    differing = {key for key in wanted if found.get(key) != wanted[key]}
    assert {key for key in differing if not allowed_difference(key, found.get(key), wanted[key])} == set()
    assert set(theirs.get("required", ())) <= set(ours.get("required", ()))
    assert list(theirs["properties"]) == list(ours["properties"])


def allowed_difference(key: str, found: tuple[Any, ...] | None, wanted: tuple[Any, ...]) -> bool:
    """Ours may say more: a pattern left out for words that are no contract."""
    return found is not None and found[:3] == wanted[:3] and key.endswith(("/class", "/expiration_rfc3339"))


def test_the_contract_names_no_shape_that_we_lack() -> None:
    theirs = {name for name in CONTRACT["components"]["schemas"] if not name.endswith("Envelope")}
    assert theirs - set(api.SHAPES) - {"Revision", "Secret", "AdTag", "Username"} == set()


@pytest.mark.parametrize(("text", "schema"), [
    ("int~", {"type": ["integer", "null"], "minimum": 0}), ("a|b~", {"type": ["string", "null"], "enum": ["a", "b", None]}),
    ("[str]", {"type": "array", "items": {"type": "string"}}), ("=x", {"type": "string", "const": "x"}),
    ("UserInfo", {"$ref": "#/components/schemas/UserInfo"})])
def test_notation(text: str, schema: dict[str, Any]) -> None:
    assert api.schema_of(text) == schema
