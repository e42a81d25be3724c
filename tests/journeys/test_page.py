"""The status page in headless Chromium against the running program.  Console errors, policy violations and foreign requests fail."""
from __future__ import annotations

import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import zxingcpp

from doubles import USERS, Proxy, Rig, free_port, patient, poll

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (dev extra)")
CHROMIUM = shutil.which("chromium") or ""
SCREENS = Path(__file__).parents[2] / "build" / "screens"
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium here (make deps-test installs it)")
expect = playwright.expect
expect.set_options(timeout=20_000)               # several polls on a loaded machine


@pytest.fixture(scope="module")                     # its event loop must be gone before the next file starts one
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as engine:
        running = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--host-resolver-rules=MAP lan.test 127.0.0.1"])
        yield running
        running.close()


class Seat:
    """A proxy with its API and a page on it; trouble: what the browser complained about."""

    def __init__(self, rig: Rig, browser: Any, config: dict[str, Any] | None = None, api: dict[str, Any] | None = None) -> None:
        self.rig, self.browser, self.port = rig, browser, free_port()
        self.api = {"enabled": True, "listen": f"127.0.0.1:{self.port}", "minimal_runtime_enabled": True,
                    "runtime_edge_enabled": True} | (api or {})
        self.config = {"server": {"api": self.api}, "general": {"links": {"public_host": "proxy.example"}}} | (config or {})
        self.proxy: Proxy = rig.proxy(self.config)
        poll(self._is_ready, "it lets clients in", 10)                  # it listens a moment before: that is a 503 on the page
        self.trouble: list[str] = []
        self.allowed: list[str] = []            # words of complaints that belong to the test
        self.context: Any = None

    def _is_ready(self) -> bool:
        try:
            self.call("/health/ready", **({"Authorization": self.api["auth_header"]} if "auth_header" in self.api else {}))
        except urllib.error.HTTPError as error:
            assert error.code == 503, error.read()
            return False
        return True

    def open(self, host: str = "127.0.0.1", path: str = "/", **options: Any) -> Any:
        if self.context is None:
            self.context = self.browser.new_context(viewport={"width": 1280, "height": 800}, locale="en-GB", **options)
        page = self.context.new_page()
        page.set_default_timeout(20_000)
        own, complain = (f"http://{host}:{self.port}/", "data:"), self.trouble.append
        page.on("console", lambda message: message.type in ("error", "warning") and complain(f"{message.text} {message.location}"))
        page.on("pageerror", lambda error: complain(f"page error: {error}"))
        page.on("request", lambda request: request.url.startswith(own) or complain(request.url))
        page.goto(f"http://{host}:{self.port}{path}")
        return page

    def call(self, path: str, method: str = "GET", body: Any = None, **headers: str) -> Any:
        """What curl would get."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1{path}", method=method, headers=headers,
                                         data=None if body is None else json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def close(self) -> None:
        if self.context is not None:
            self.context.close()
        left = [text for text in self.trouble if not any(word in text for word in self.allowed)]
        assert not left, left


@pytest.fixture
def sit(rig: Rig, browser: Any) -> Iterator[Any]:
    seats: list[Seat] = []

    def make(config: dict[str, Any] | None = None, **api: Any) -> Seat:
        seats.append(Seat(rig, browser, config, api))
        return seats[-1]

    yield make
    for seat in seats:
        seat.close()


def shoot(page: Any, name: str) -> None:
    """Keep pictures in both sizes and themes; a page never scrolls sideways."""
    SCREENS.mkdir(parents=True, exist_ok=True)
    for theme in ("light", "dark"):
        for size in ((1280, 800), (390, 844)):
            page.emulate_media(color_scheme=theme)
            page.set_viewport_size({"width": size[0], "height": size[1]})
            page.evaluate("scrollTo(0, 0)")          # else the line at the top hangs over what the test looked at last
            page.screenshot(path=SCREENS / f"{name}-{theme}-{size[0]}.png", full_page=True)
    page.set_viewport_size({"width": 320, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.set_viewport_size({"width": 1280, "height": 800})


def row(page: Any, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def dialog(page: Any) -> Any:
    return page.get_by_role("dialog")


# -- what it shows

def test_normal(sit: Any, rig: Rig) -> None:
    seat = sit({"access": {"user_max_tcp_conns": {"bob": 1}, "user_data_quota": {"alice": 10**9}}})
    client = rig.client("alice")
    rig.client("bob")
    page = seat.open()
    expect(page.locator("#verdict")).to_have_text("● Running (direct)")
    expect(page.locator("#verdict")).to_have_attribute("role", "status")
    expect(page.locator("#Connections dd >> nth=0")).to_have_text("2")
    expect(page.locator("#Traffic dd >> nth=0")).to_have_text("–")           # one sample is no rate
    client.download(30_000_000)
    expect(page.locator("#Traffic dd >> nth=0")).to_contain_text("MB/s")
    expect(page.locator("#users tr").first).to_contain_text("online")
    expect(page.locator("#users")).to_contain_text("at connection limit")
    expect(page.locator("#users")).to_contain_text("of 1.0 GB")
    row(page, "alice").click()
    expect(page.locator("#users")).to_contain_text("127.0.0.1")
    page.locator("#events summary").click()
    page.locator("#details summary").click()
    expect(page.locator("#details")).to_contain_text("upstream.connect_success_total")
    expect(page.locator("#details")).to_contain_text("every program and rebound page on this machine can read the links")
    expect(page.locator("#telegram")).to_contain_text("healthy")
    expect(page.locator("#telegram")).to_contain_text("No Middle-End in direct mode")
    expect(page.get_by_role("img", name="Traffic: now")).to_be_visible()
    shoot(page, "normal")


def test_features_off_and_read_only(sit: Any) -> None:
    seat = sit(minimal_runtime_enabled=False, runtime_edge_enabled=False, read_only=True)
    page = seat.open()
    expect(page.locator("#telegram")).to_contain_text("server.api.minimal_runtime_enabled = true")
    page.locator("#events summary").click()
    expect(page.locator("#events")).to_contain_text("server.api.runtime_edge_enabled = true")
    row(page, "alice").click()
    expect(page.get_by_role("button", name="Edit")).to_have_count(0)
    expect(page.locator("#create")).to_be_hidden()
    expect(page.get_by_role("button", name="Copy").first).to_be_visible()
    shoot(page, "features-off")


def test_a_thousand_users(sit: Any) -> None:
    users = {f"user{number:04}": f"{number:032x}" for number in range(1, 1001)}
    seat = sit({"access": {"users": users}})
    page = seat.open()
    expect(page.locator("#count")).to_contain_text("300 of", timeout=30_000)
    page.locator("#search").fill("user0777")
    expect(page.locator("#count")).to_contain_text("1 of")
    expect(row(page, "user0777")).to_be_visible()
    page.locator("#search").fill("")
    shoot(page, "many")


def test_telemetry_off_is_not_counted_instead_of_zero(sit: Any) -> None:
    page = sit({"general": {"telemetry": {"user_enabled": False, "core_enabled": False}}}).open()
    expect(page.locator("#Connections dd >> nth=0")).to_have_text("not counted")
    expect(page.locator("#Connections dd + dd")).to_have_text("general.telemetry.user_enabled = false")
    expect(page.locator("[id='New connections'] dd >> nth=0")).to_have_text("not counted")


def test_restart_and_unreachable(sit: Any, rig: Rig) -> None:
    seat = sit()
    seat.allowed = ["Failed to load resource", "ERR_CONNECTION_REFUSED"]
    client = rig.client("alice")
    page = seat.open()
    client.download(5_000_000)
    expect(page.locator("#users")).to_contain_text("5.0 MB")
    poll(lambda: seat.call("/stats/summary")["data"]["uptime_seconds"] > 12, "it ran for longer than the next one before it is asked", 20)
    client.close()
    seat.proxy.stop()
    expect(page.locator("#verdict")).to_contain_text("No answer for", timeout=30_000)
    expect(page.locator("#users")).to_contain_text("5.0 MB")               # kept, not replaced by zeros
    expect(page.locator("main")).to_have_class("stale")
    shoot(page, "unreachable")
    again = rig.proxy(seat.config)
    expect(page.locator("#banner")).to_contain_text("Proxy restarted at", timeout=60_000)
    expect(page.locator("#verdict")).to_have_text("● Running (direct)")
    assert again.process.poll() is None


def test_config_made_unreadable_is_said(sit: Any) -> None:
    seat = sit()
    seat.allowed = ["500"]
    page = seat.open()
    expect(page.locator("#verdict")).to_have_text("● Running (direct)")
    aside = seat.proxy.config.with_suffix(".aside")
    seat.proxy.config.rename(aside)
    expect(page.locator("#verdict")).to_contain_text("failed to read config", timeout=20_000)
    other = seat.open()
    expect(other.locator("#verdict")).to_contain_text("failed to read config")          # the page itself loads
    aside.rename(seat.proxy.config)
    expect(page.locator("#verdict")).to_have_text("● Running (direct)", timeout=20_000)


# -- the prompt

def test_the_header_is_asked_for_once(sit: Any) -> None:
    seat = sit(auth_header="Bearer right")
    seat.allowed = ["401"]
    page = seat.open()
    expect(dialog(page)).to_contain_text("server.api.auth_header")
    shoot(page, "prompt")
    page.locator("#f-auth").fill("Bearer wrong")
    page.get_by_role("button", name="Use it").click()
    expect(dialog(page)).to_contain_text("This value is wrong")
    page.locator("#f-auth").fill("ключ")
    page.get_by_role("button", name="Use it").click()
    expect(dialog(page)).to_contain_text("Only visible ASCII")
    page.locator("#f-auth").fill("Bearer right")
    page.get_by_role("button", name="Use it").click()
    expect(page.locator("#verdict")).to_have_text("● Running (direct)")
    page.reload()
    expect(page.locator("#verdict")).to_have_text("● Running (direct)")                # this tab remembers
    fresh = seat.context.browser.new_context()
    other = fresh.new_page()
    other.goto(page.url)
    expect(other.get_by_role("dialog")).to_contain_text("server.api.auth_header")      # a new one asks
    fresh.close()
    assert "right" not in page.url and not seat.context.cookies()


# -- changes

def test_create_ends_on_a_link_that_works(sit: Any, rig: Rig) -> None:
    seat = sit({"general": {"links": {"public_host": "127.0.0.1"}}})
    page = seat.open()
    page.get_by_role("button", name="New user").click()
    page.locator("#f-username").fill("carol")
    page.get_by_role("button", name="Create").click()
    expect(dialog(page)).to_contain_text("Link of carol")
    picture = dialog(page).get_by_role("img", name="QR code of the link")
    expect(picture).to_be_visible()
    shot = zxingcpp.read_barcodes(_decode(picture.screenshot()))
    link = dialog(page).get_by_role("textbox").input_value()
    assert [code.text for code in shot] == [link] and link.startswith("tg://proxy?server=127.0.0.1")
    shoot(page, "qr")
    secret = bytes.fromhex(link.rpartition("secret=ee")[2][:32])
    client = rig.client("alice", secret=secret)
    client.req_pq()


def _decode(png: bytes) -> Any:
    import io

    from PIL import Image
    return numpy.asarray(Image.open(io.BytesIO(png)).convert("L"))


def test_conflict_keeps_what_was_typed(sit: Any) -> None:
    seat = sit()
    seat.allowed = ["409"]
    page = seat.open()
    row(page, "alice").click()
    page.get_by_role("button", name="Edit").click()
    box = page.locator("#f-max_tcp_conns")
    page.get_by_label("no limit").first.uncheck()
    box.fill("7")
    expect(dialog(page)).to_contain_text("about 8 connections")
    seat.call("/users/alice", "PATCH", {"max_unique_ips": 9}, **{"Content-Type": "application/json"})
    page.get_by_role("button", name="Save").click()
    expect(dialog(page)).to_contain_text("max_unique_ips is now 9")
    expect(box).to_have_value("7")
    page.get_by_role("button", name="Save over it").click()
    expect(dialog(page)).to_have_count(0)
    alice = seat.call("/users/alice")["data"]
    assert (alice["max_tcp_conns"], alice["max_unique_ips"]) == (7, 9)


def test_limits_are_removed_with_null_and_zero_is_explained(sit: Any) -> None:
    seat = sit({"access": {"user_max_tcp_conns": {"alice": 5}}})
    page = seat.open()
    row(page, "alice").click()
    page.get_by_role("button", name="Edit").click()
    page.locator("#f-max_tcp_conns").fill("0")
    expect(dialog(page)).to_contain_text("0 blocks this user")
    page.get_by_label("no limit").first.check()
    page.get_by_role("button", name="+30 days").click()
    page.get_by_role("button", name="Save").click()
    expect(dialog(page)).to_have_count(0)
    alice = seat.call("/users/alice")["data"]
    assert alice["max_tcp_conns"] is None
    until = time.mktime(time.strptime(alice["expiration_rfc3339"][:19], "%Y-%m-%dT%H:%M:%S")) - time.timezone
    assert abs(until - time.time() - 30 * 86400) < 120
    expect(page.locator("#users tr").first).not_to_contain_text("never")


def test_a_name_that_exists(sit: Any) -> None:
    seat = sit()
    seat.allowed = ["409"]
    page = seat.open()
    page.get_by_role("button", name="New user").click()
    page.locator("#f-username").fill("alice")
    page.get_by_role("button", name="Create").click()
    expect(dialog(page)).to_contain_text("This name exists")
    expect(page.locator("#f-username")).to_be_focused()
    page.keyboard.press("Escape")
    expect(dialog(page)).to_have_count(0)
    expect(page.get_by_role("button", name="New user")).to_be_focused()


def test_a_new_secret_closes_live_sessions(sit: Any, rig: Rig) -> None:
    seat = sit()
    client = rig.client("alice")
    client.echo()
    page = seat.open()
    row(page, "alice").click()
    page.get_by_role("button", name="New secret").click()
    expect(dialog(page)).to_contain_text("Closes 1 connections now. Old links stop working.")
    expect(page.get_by_role("button", name="Cancel")).to_be_focused()
    dialog(page).get_by_role("button", name="New secret").click()
    expect(dialog(page)).to_contain_text("Link of alice")
    client.sock.settimeout(patient(10))
    assert client.sock.recv(1) == b""


def test_disable_enable_and_delete(sit: Any) -> None:
    seat = sit()
    page = seat.open()
    row(page, "bob").click()
    page.get_by_role("button", name="Disable").click()
    dialog(page).get_by_role("button", name="Disable").click()
    expect(page.locator("#users")).to_contain_text("disabled")
    page.get_by_role("button", name="Enable").click()
    expect(page.locator("#users")).not_to_contain_text("disabled")
    page.get_by_role("button", name="Delete").click()
    dialog(page).get_by_role("button", name="Delete").click()
    expect(row(page, "bob")).to_have_count(0)
    for name in set(USERS) - {"alice", "bob"}:
        seat.call(f"/users/{name}", "DELETE")
    expect(page.locator("#count")).to_have_text("1 of 1 users", timeout=15_000)
    row(page, "alice").click()
    expect(page.get_by_role("button", name="Edit")).to_be_visible()
    expect(page.get_by_role("button", name="Delete")).to_have_count(0)                  # the only user stays


def test_keyboard_only(sit: Any) -> None:
    seat = sit()
    page = seat.open()
    expect(page.locator("#users tr").first).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.locator("#pause")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#pause")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Enter")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.getAttribute('aria-expanded')"):
            break
    page.keyboard.press("Enter")
    expect(page.locator("#users button[aria-expanded=true]")).to_have_count(1)
    page.wait_for_timeout(6000)                    # two polls later the focus is where it was
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"


def test_sorting_and_filters(sit: Any, rig: Rig) -> None:
    seat = sit({"access": {"user_enabled": {"bob": False}}})
    rig.client("alice")
    page = seat.open()
    expect(page.locator("#users")).to_contain_text("online")
    page.locator("#filter").select_option("Attention")
    expect(page.locator("#count")).to_contain_text("1 of")
    expect(row(page, "bob")).to_be_visible()
    page.locator("#filter").select_option("Online")
    expect(row(page, "alice")).to_be_visible()
    page.locator("#filter").select_option("All")
    page.get_by_role("button", name="Name").click()
    expect(page.locator("#by-name")).to_have_attribute("aria-sort", "descending")
    names = page.locator("#users bdi").all_inner_texts()
    assert names == sorted(names, reverse=True) and len(names) > 1


# -- hostile surroundings

HOSTILE = ["<img src=x onerror=alert(1)>", "\"quotes' & <b>", "right\u202eto left", "new\nline\x1b[31m", "a/b", "W" * 64]


def test_hostile_names_are_text(sit: Any) -> None:
    seat = sit({"access": {"users": {name: f"{number:032x}" for number, name in enumerate(HOSTILE, 1)}}})
    page = seat.open()
    expect(page.locator("#users bdi").first).to_be_visible()
    shown = page.locator("#users bdi").all_text_contents()
    for name in HOSTILE:
        assert name.replace("\n", "\\x0a").replace("\x1b", "\\x1b") in shown
    assert page.locator("#users img").count() == 0
    page.locator("#users bdi", has_text="a/b").click()
    expect(page.locator("#users")).to_contain_text("Edit this name in the file")
    page.set_viewport_size({"width": 320, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_over_http_to_a_lan_name(sit: Any) -> None:
    """No Sec-Fetch headers and no clipboard there: changes and Copy work all the same."""
    seat = sit()
    seat.allowed = ["Cross-Origin-Opener-Policy header has been ignored"]
    page = seat.open("lan.test")
    assert not page.evaluate("isSecureContext") and not page.evaluate("!!navigator.clipboard")
    row(page, "alice").click()
    page.get_by_role("button", name="Copy").first.click()
    expect(page.locator("#users")).to_contain_text("Copied")
    page.get_by_role("button", name="Disable").click()
    dialog(page).get_by_role("button", name="Disable").click()
    expect(page.locator("#users")).to_contain_text("disabled")
    assert seat.call("/users/alice")["data"]["enabled"] is False


def test_a_foreign_page_cannot_change_anything(sit: Any) -> None:
    seat = sit()
    before = seat.call("/users")["revision"]
    page = seat.browser.new_page()
    target = f"http://127.0.0.1:{seat.port}/v1/users"
    page.route("http://evil.test/**", lambda route: route.fulfill(body="<p>evil", content_type="text/html"))
    page.goto("http://evil.test/")
    page.evaluate("""async target => {
      const tries = [["POST", {}], ["POST", {"Content-Type": "text/plain"}], ["POST", {"Content-Type": "application/json"}]]
      for (const [method, headers] of tries)
        try { await fetch(target, {method, headers, body: JSON.stringify({username: "evil"})}) } catch {}
      for (const mode of ["no-cors", "cors"])
        try { await fetch(target, {method: "POST", mode, body: JSON.stringify({username: "evil"})}) } catch {}
      try { await fetch(target + "/alice", {method: "DELETE"}) } catch {}
      const form = document.createElement("form")
      form.action = target + "/alice/disable"; form.method = "post"; document.body.append(form); form.submit()
    }""", target)
    page.wait_for_timeout(500)
    page.close()
    after = seat.call("/users")
    assert after["revision"] == before and all(user["enabled"] for user in after["data"])


# -- accessibility

@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(sit: Any, rig: Rig, theme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    rig_client = sit()
    rig.client("alice")
    page = rig_client.browser.new_page(bypass_csp=False, color_scheme=theme)
    page.goto(f"http://127.0.0.1:{rig_client.port}/")
    expect(page.locator("#users tr").first).to_be_visible()
    row(page, "alice").click()
    page.locator("#details summary").click()
    expect(page.locator("#details td").first).to_be_visible()
    script = Path(axe.__file__).parent / "axe.min.js"
    found = page.evaluate(script.read_text() + "\n;axe.run()")
    violations = [(rule["id"], [node["html"][:120] for node in rule["nodes"]]) for rule in found["violations"]]
    page.close()
    assert not violations, violations


def test_gates_of_the_page(sit: Any) -> None:
    seat = sit(auth_header="secret", allowed_hosts=["panel.test"])

    def status(path: str, method: str = "GET", host: str = "127.0.0.1") -> tuple[int, str]:
        request = urllib.request.Request(f"http://127.0.0.1:{seat.port}{path}", method=method, headers={"Host": host})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.headers["Content-Type"]
        except urllib.error.HTTPError as error:
            return error.code, error.headers["Content-Type"]

    for path in ("/", "/ui", "/ui/", "/?x=1", "//"):
        assert status(path) == (200, "text/html; charset=utf-8"), path
    assert status("/", "HEAD")[0] == 200
    assert status("/", "POST")[0] == 401 and status("/ui", host="evil.test")[0] == 403
    assert status("/v1/health")[0] == 401
