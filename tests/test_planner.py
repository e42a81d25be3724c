"""Room 12: the planner."""
from __future__ import annotations

import telemt


def test_the_pace_of_health_starts_at_the_base_and_never_passes_the_cap():
    general = telemt.General(me_reconnect_backoff_base_ms=500, me_reconnect_backoff_cap_ms=30_000)
    assert telemt.Pace.of_health(general) == (0.5, 30.0)
    assert telemt.Pace.of_health(telemt.General(me_reconnect_backoff_base_ms=500, me_reconnect_backoff_cap_ms=100)) == (0.5, 0.5)
