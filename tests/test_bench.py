"""tools/bench: its arithmetic, its documents and its guard (the measuring itself is `make bench`, never a test)."""
import json
from collections import Counter
from itertools import pairwise, permutations, product

import pytest

import bench_api
import bench_middle
import bench_pollers
import bench_report
from bench_report import FIGURES, between, dig, figure_table, ratios, spread, table, verdict, worse

BACKENDS = ("cryptography", "libcrypto")


def row(ratio, target=1.3, other=None):
    return {"unit": "s/GB", "target": target, "reference": "scatter", "bare": 0.2, "cryptography": {"cost": ratio * 0.2, "ratio": ratio},
            "libcrypto": {"cost": 0.2, "ratio": other or ratio}}


def test_ratios_are_taken_round_by_round():
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="one reference"):
        ratios([1.0], [1.0, 2.0])


@pytest.mark.parametrize(("value", "target", "text"), [
    (1.2, 1.3, "1.20x"), (1.3, 1.3, "1.30x"), (1.31, 1.3, "**1.31x (missed)**"), (9.0, 0, "9.00x"),
])
def test_verdict(value, target, text):
    assert verdict(value, target) == text


def test_table_shows_cost_ratio_target_and_reference():
    lines = table({"FakeTLS download": row(1.5, other=1.1), "slow path": row(2.0, target=0)}, BACKENDS).splitlines()
    assert lines[2] == "| FakeTLS download | <= 1.3x scatter | 0.3 s/GB, **1.50x (missed)** | 0.2 s/GB, 1.10x | scatter 0.2 s/GB |"
    assert lines[3].startswith("| slow path | - | 0.4 s/GB, 2.00x |")
    assert len({line.count("|") for line in lines}) == 1


def figures(value):
    found = {}
    for _, _, path, _, _ in FIGURES:
        inner = found
        for step in path[:-1]:
            inner = inner.setdefault(step, {})
        inner[path[-1]] = value
    return found


def test_figures_are_marked_where_they_miss_their_limit():
    lines = figure_table({"cryptography": figures(20.0), "libcrypto": figures(0.1)}, BACKENDS).splitlines()
    memory = next(line for line in lines if line.startswith("| base memory"))
    assert memory == "| base memory | <= 22 MB, libcrypto 17 | 20.0 MB | 0.1 MB |"
    assert "(missed)" in next(line for line in lines if line.startswith("| start to listening"))
    assert len(lines) == len(FIGURES) + 2


def test_dig():
    assert dig({"a": {"b": 3}}, ("a", "b")) == 3.0


def test_between_replaces_only_what_stands_between_the_markers():
    text = "head\n<!-- rows -->\nold\n<!-- /rows -->\ntail"
    assert between(text, "rows", "new") == "head\n<!-- rows -->\nnew\n<!-- /rows -->\ntail"
    with pytest.raises(ValueError, match="once each"):
        between("no markers", "rows", "new")


def test_spread():
    assert spread([1.0, 1.2, 1.1]) == pytest.approx(0.2)


@pytest.mark.parametrize(("now", "before", "found"), [
    (1.25, 1.0, []), (1.26, 1.0, ["x (cryptography): 1.00 -> 1.26", "x (libcrypto): 1.00 -> 1.26"]), (0.5, 1.0, []),
])
def test_worse_by_more_than_a_quarter(now, before, found):
    assert worse({"x": row(now)}, {"x": row(before)}, BACKENDS) == found


def test_a_lucky_figure_does_not_raise_the_bar():
    """The bare loop is the least that can be done: a committed 0.8 is noise, and 1.2 after it no regression."""
    assert worse({"x": row(1.2)}, {"x": row(0.8)}, BACKENDS) == []
    assert len(worse({"x": row(1.3)}, {"x": row(0.8)}, BACKENDS)) == 2


def test_a_row_that_is_new_is_not_worse():
    assert worse({"x": row(9.0)}, {}, BACKENDS) == []


@pytest.mark.parametrize(("runs", "code"), [([1.0], 0), ([2.0, 1.0], 0), ([2.0, 2.0], 1)])
def test_guard_trips_only_twice_in_a_row(tmp_path, capsys, runs, code):
    committed = tmp_path / "performance.json"
    committed.write_text(json.dumps({"rows": {"x": row(1.0)}}))
    todo = iter(runs)
    assert bench_report.check(lambda: {"x": row(next(todo))}, committed, BACKENDS) == code
    assert ("WORSE x" in capsys.readouterr().out) is bool(code)


def test_two_different_rows_are_no_confirmation(tmp_path):
    committed = tmp_path / "performance.json"
    committed.write_text(json.dumps({"rows": {"x": row(1.0), "y": row(1.0)}}))
    todo = iter([{"x": row(2.0), "y": row(1.0)}, {"x": row(1.0), "y": row(2.0)}])
    assert bench_report.check(lambda: next(todo), committed, BACKENDS) == 0


def test_write_fills_the_document(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in ("machine", "rows", "figures", "scaling")))
    (tmp_path / "operations.md").write_text("<!-- capacity -->\n<!-- /capacity -->\n")
    found = {"rows": CAPACITY_ROWS | {"x": row(1.0)}, "machine": {"kernel": "Linux"}, "rounds": 5,
             "figures": {"compile_ms": 99.0, "pure_python_mb_per_s": 20.0, **{backend: figures(0.0) for backend in BACKENDS}},
             "scaling": {"sessions": [1.0, 10.0, 100.0], "s_per_gb": [0.3] * 3, "us_per_trip": [30.0, 33.0, 33.0],
                         "bare_s_per_gb": [0.2, 0.3, 0.2], "bare_us_per_trip": [20.0, 22.0, 22.0]}}
    bench_report.write(found, tmp_path, BACKENDS)
    assert "| people online | 1,000 |" in (tmp_path / "operations.md").read_text()
    text = page.read_text()
    assert "- kernel: Linux" in text and "| x |" in text and "20.0 MB/s" in text
    assert "per event 10%, of the ratio to the bare loop 0%" in text
    assert "| 10 | 0.300 | 0.300 | 1.00 | 33.0 | 22.0 | 1.50 |" in text and "per byte 0%, of the ratio to the bare loop 50%" in text
    assert json.loads((tmp_path / "performance.json").read_text())["rounds"] == 5
    assert (tmp_path / "images" / "scaling.svg").read_text().lstrip().startswith("<?xml")


def test_a_run_that_was_interrupted_goes_on(tmp_path):
    def never():
        raise AssertionError("measured again")

    def stops():
        raise KeyboardInterrupt

    first = bench_report.Kept("bench", folder=tmp_path / "kept")
    assert first.part("a", lambda: {"ratio": 1.5}) == {"ratio": 1.5}
    with pytest.raises(KeyboardInterrupt):
        first.part("b", stops)
    again = bench_report.Kept("bench", folder=tmp_path / "kept")
    assert again.part("a", never) == {"ratio": 1.5} and again.part("b", lambda: 2.0) == 2.0
    assert bench_report.Kept("bench", use=False, folder=tmp_path / "kept").part("a", lambda: 3.0) == 3.0
    assert bench_report.Kept("bench", folder=tmp_path / "kept").part("a", never) == {"ratio": 1.5}
    bench_report.Kept.forget(tmp_path / "kept")
    assert bench_report.Kept("bench", folder=tmp_path / "kept").part("a", lambda: 4.0) == 4.0


def test_parts_of_another_program_count_for_nothing(tmp_path):
    assert bench_report.Kept("bench", folder=tmp_path, books=("telemt.py",)).part("a", lambda: 1.0) == 1.0
    assert bench_report.Kept("bench", folder=tmp_path, books=("tools/bench.py",)).part("a", lambda: 2.0) == 2.0


# -- capacity ----------------------------------------------------------------------------------------------------------------------

CAPACITY_ROWS = {name: {"unit": unit, "target": 0, "reference": "scatter", "bare": cost,
                        **{backend: {"cost": cost, "ratio": 1.0} for backend in BACKENDS}}
                 for name, unit, cost in (("FakeTLS download, 1 session", "s/GB", 0.28), ("FakeTLS download in 4 KiB writes", "s/GB", 4.0),
                                          ("FakeTLS handshake to the first answer, 1 user", "us", 400.0))}


def test_capacity_is_arithmetic():
    """Ten connections a person, 0.7 of a core; every number of the table follows from five measured ones."""
    found = {"rows": CAPACITY_ROWS, "figures": {"cryptography": {"base_mb": 25.0, "session_kb": 5.12}}, "scaling": {
        "us_per_trip": [90.0, 80.0, 10.0, 20.0]}}
    text = bench_report.capacity_table(found)
    assert "| people online | 1,000 | 4,000 | 40,000 |" in text and "| memory per host | 75 MB | 300 MB | 300 MB |" in text
    # a person: 12.5 KB/s x 4 s/GB = 50 us, 0.2 messages x 20 us = 4 us, 2/60 connections x 400 us = 13.3 us
    assert "= 67.3 us" in text and "| share of each core that they use | 7 % | 7 % | 7 % |" in text
    assert "| most traffic per host, 4 KiB at a time | 1.4 Gbit/s | 5.6 Gbit/s | 5.6 Gbit/s |" in text
    assert "| most traffic per host, 1 MiB at a time | 20 Gbit/s | 80 Gbit/s | 80 Gbit/s |" in text
    assert "| most new connections per second | 1,750 | 7,000 | 70,000 |" in text
    assert "| most messages per second | 35,000 | 140,000 | 1,400,000 |" in text


# -- polling -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("ratios", "shown"), [([0.9, 0.99, 1.01], "0.990 |"), ([0.9, 0.96, 1.01], "**0.960 (missed)** |")])
def test_the_cost_of_watching_is_the_median_of_the_rounds(ratios, shown):
    """Every round is compared with the quiet run of the same round; the control has no target."""
    quiet = [bench_api.Run(speed, 0.3, 0.0, 0.0) for speed in (1000.0, 500.0, 2000.0)]
    watched = [bench_api.Run(run.mb_per_s * ratio, 0.306, 5.5, 6.0) for run, ratio in zip(quiet, ratios, strict=True)]
    found = {"quiet": quiet, "again": quiet, "panel": watched, "elsewhere": watched, "watchers": quiet}
    lines = bench_api.report(found).splitlines()
    assert shown in lines[4] and lines[4].endswith("0.306 s/GB | 1.020 | 5.5 ms/s, 0.11 ms per poll | 6.0 ms/s |")
    assert f"| {(0.9 + ratios[1]) / 2:.3f}-{(1.01 + ratios[1]) / 2:.3f} |" in lines[4]
    assert "missed" not in lines[5] and lines[6].count(" 1.000 |") == 2 and lines[3].endswith(" 1.000 | - | - |")
    assert len({line.count("|") for line in lines}) == 1


def test_every_way_of_watching_comes_at_every_place_and_after_every_other():
    """Or what a run leaves behind would always hit the same one."""
    ways = list(bench_api.VISITORS)
    orders = [bench_api.order_of(number) for number in range(2 * len(ways))]
    assert Counter((way, order.index(way)) for order in orders for way in ways) == dict.fromkeys(product(ways, range(len(ways))), 2)
    assert Counter(pair for order in orders for pair in pairwise(order)) == dict.fromkeys(permutations(ways, 2), 2)


def test_pollers_are_compared_in_one_table():
    rows = {"round trip": {"unit": "us", "epoll": {"cost": 8.0, "ratio": 1.0}, "uvloop": {"cost": 12.34, "ratio": 1.5}},
            "wake-ups": {"unit": "", "epoll": {"cost": 1.0, "ratio": 0.0}, "uvloop": {"cost": 1.0, "ratio": 0.0}}}
    assert bench_pollers.table(rows, ["epoll", "uvloop"]).splitlines()[2:] == ["| round trip | 8 us, 1.00x | 12.3 us, 1.50x |",
                                                                              "| wake-ups | 1 | 1 |"]


# -- the middle end ----------------------------------------------------------------------------------------------------------------

def test_the_middle_end_writes_its_rows_and_says_which_are_missed(tmp_path):
    """The latency beside a stalled client is a row like the others: milliseconds, its own reference, its mark."""
    name = bench_middle.STALL_ROW.format(500)
    found = {name: {"unit": "ms", "target": bench_middle.STALL_TARGET, "reference": "undisturbed", "bare": 0.1,
                    "cryptography": {"cost": 0.15, "ratio": 1.5}, "libcrypto": {"cost": 0.21, "ratio": 2.1}}}
    page = tmp_path / "performance.md"
    page.write_text("head\n<!-- middle -->\n<!-- /middle -->\n")
    bench_middle.write(found, tmp_path)
    assert "500 sessions beside one that asked for 12 MiB" in name
    line = page.read_text().splitlines()[4]
    assert line == table(found, BACKENDS).splitlines()[2] and line.startswith(f"| {name} | <= 2x undisturbed | 0.15 ms, 1.50x | 0.21 ms, ")
    assert line.count("(missed)") == 1
    assert json.loads((tmp_path / "performance-middle.json").read_text()) == found
    assert bench_middle.missed(found) and not bench_middle.missed(found, ["cryptography"])


def test_the_table_of_the_middle_end_is_that_of_its_figures():
    found = json.loads((bench_middle.ROOT / "docs" / "performance-middle.json").read_text())
    page = (bench_middle.ROOT / "docs" / "performance.md").read_text()
    assert between(page, "middle", table(found, BACKENDS)) == page
