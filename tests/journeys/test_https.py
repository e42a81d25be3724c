"""What the program fetches over https: with a certificate of an authority it knows (SSL_CERT_FILE), and without."""
from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from doubles import Rig
from fake_middle_end import MeSite, MeWorld


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an authority of our own (ca.pem) and the certificate of localhost that it signed (site.pem)."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl not installed (make deps-test)")
    folder = tmp_path_factory.mktemp("authority")
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    (folder / "site.cnf").write_text("[req]\ndistinguished_name = name\n[name]\n[site]\nbasicConstraints = critical,CA:FALSE\n"
                                     "subjectAltName = DNS:localhost\nsubjectKeyIdentifier = hash\nauthorityKeyIdentifier = keyid\n")
    for more in (["-subj", "/CN=Test CA", "-addext", "keyUsage = critical,keyCertSign", "-keyout", "ca.key", "-out", "ca.pem"],
                 ["-subj", "/CN=localhost", "-config", "site.cnf", "-extensions", "site", "-CA", "ca.pem", "-CAkey", "ca.key",
                  "-keyout", "site.pem", "-out", "site.crt"]):
        subprocess.run([*new, *more], cwd=folder, check=True, capture_output=True)
    with (folder / "site.pem").open("a") as file:
        file.write((folder / "site.crt").read_text())
    return folder


def secure(site: MeSite, authority: Path) -> str:
    """Let a site speak TLS; its URL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "site.pem")
    site._server.handle_error = lambda *_: None                    # type: ignore[method-assign,assignment]     # who refuses us
    site._server.socket = context.wrap_socket(site._server.socket, server_side=True, do_handshake_on_connect=False)
    return f"https://localhost:{site.port}"


@pytest.fixture
def world() -> Iterator[MeWorld]:
    with MeWorld({2: 1}) as found:
        yield found
        assert found.faults == []


def config_of(world: MeWorld, url: str) -> dict[str, Any]:
    config = world.config()
    for key, path in (("proxy_secret_url", "Secret"), ("proxy_config_v4_url", "Config"), ("proxy_config_v6_url", "ConfigV6")):
        config["general"][key] = f"{url}/getProxy{path}"
    return config


def test_the_files_of_the_middle_end(rig: Rig, world: MeWorld, authority: Path) -> None:
    url = secure(world.site, authority)
    rig.proxy(config_of(world, url), env={"SSL_CERT_FILE": str(authority / "ca.pem")})
    world.mes[2][0].take()
    rig.client().echo()
    assert world.site.secret_page.hits == 1 and world.site.pages["/getProxyConfig"].hits == 1


def test_a_site_that_nobody_vouches_for_is_not_believed(rig: Rig, world: MeWorld, authority: Path) -> None:
    """No byte of the files is asked for, the log says why, and sessions go the direct way."""
    url = secure(world.site, authority)
    proxy = rig.proxy(config_of(world, url))
    proxy.wait_log(r"WARN .*proxy-secret download failed.*CERTIFICATE_VERIFY_FAILED", timeout=30)
    assert not any(page.hits for page in world.site.pages.values())
    rig.client().echo()
    assert len(rig.dc.peers) == 1


def test_an_address_service(rig: Rig, authority: Path) -> None:
    """The site comes last of the services, is believed because of its certificate, and its answer is in the links."""
    site = MeSite()
    try:
        site.secret_page.body = b"8.8.4.4\n"
        url = secure(site, authority)
        nat = {"general": {"middle_proxy_nat_probe": True, "links": {"show": "*"}}, "server": {"listeners": [{"ip": "0.0.0.0"}]},
               "network": {"stun_use": False, "http_ip_detect_urls": [f"{url}/gone", f"{url}/getProxySecret"]}}
        proxy = rig.proxy(nat, env={"SSL_CERT_FILE": str(authority / "ca.pem")})
        if not proxy.log("ipv4_bogon=true"):
            pytest.skip("this machine has no private IPv4 address with a route: the services are not asked")
        proxy.wait_log("STUN unavailable, using HTTP public IPv4 fallback")
        proxy.wait_log(r"tg://proxy\?server=8\.8\.4\.4&")
        assert site.secret_page.hits == 1
    finally:
        site.close()
