"""telemt_api room 9: start and stop."""
import telemt
import telemt_api
from tests.cases import BACKEND, TestLoop, settings_of


def test_start_returns_what_stops_it():
    loop = TestLoop()
    server = telemt.Server(settings_of("[server]\nport = 0\n"), loop, BACKEND, 4096)
    telemt_api.start(telemt.Control(server, "config.toml"))()
    loop.dispose()
