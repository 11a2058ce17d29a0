#!/usr/bin/env python3
"""Plants an error of each kind and expects check-dashboards.py to find it. With grafana-foundation-sdk also schema errors."""

import copy
import importlib.util
import sys
import unittest
from pathlib import Path

sys.dont_write_bytecode = True
spec = importlib.util.spec_from_file_location("check", Path(__file__).parent / "check-dashboards.py")
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)

METRICS = {
    "requests_total": check.Metric("counter", set(check.PATH_LABELS)),
    "lost_total": check.Metric("counter", {"direction", *check.PATH_LABELS}, {"direction": {"forward", "reverse", "unknown"}}),
    "rtt_seconds": check.Metric("histogram", set(check.PATH_LABELS)),
    "turnaround_seconds": check.Metric("summary", set(check.PATH_LABELS)),
    "draining": check.Metric("gauge", set(check.PATH_LABELS)),
    "pair:loss:ratio": check.Metric("gauge", set(check.PATH_LABELS)),
    "peer_info": check.Metric("gauge", {"peer", "label_*"}),
}

# Expression and expected problem; empty for none.
QUERIES = [
    ('sum by (peer) (rate(requests_total{probe="fast"}[1m]))', ""),
    ("histogram_quantile(0.99, sum by (le) (rate(rtt_seconds_bucket[5m]))) and sum(increase(rtt_seconds_count[5m])) >= 300", ""),
    ("count by (instance) (count by (instance, peer) (requests_total))", ""),
    ("changes(draining[1m]) > 0", ""),
    ('label_replace(draining, "other", "$1", "peer", "(.+)") * on (other) group_left (label_zone) draining or peer_info', ""),
    ("sum(rate(request_total[1m]))", "uses request_total, which is neither"),
    ("rate(pair:loss:rate5m[1m])", "uses pair:loss:rate5m, which is neither"),
    ("rtt_seconds > 1", "a histogram, without _bucket"),
    ("rate(turnaround_seconds_bucket[1m])", "uses turnaround_seconds_bucket, which is neither"),
    ("rate(draining[1m])", "rate() of draining, which is not a counter"),
    ("increase(pair:loss:ratio[1m])", "increase() of pair:loss:ratio, which is not a counter"),
    ("sum(delta(requests_total[1m]))", "delta() of requests_total, a counter"),
    ("max_over_time(rtt_seconds_count[5m])", "max_over_time() of rtt_seconds_count, a counter"),
    ("sum(draining[1m])", "has a window of draining in sum()"),
    ("sum(requests_total)", "shows requests_total itself"),
    ("rtt_seconds_sum / rtt_seconds_count", "shows rtt_seconds_sum itself"),
    ("histogram_quantile(0.99, sum by (le) (rtt_seconds_bucket))", "quantile of rtt_seconds_bucket without a rate"),
    ("histogram_quantile(0.99, sum by (peer) (rate(rtt_seconds_bucket[5m])))", "sums the buckets of rtt_seconds_bucket without le"),
    ("histogram_quantile(0.99, rate(rtt_seconds_sum[5m]))", "quantile of rtt_seconds_sum without a rate of its buckets"),
    ("rate(requests_total[30s])", "has a window of 30s, too short"),
    ("max_over_time(sum(rate(requests_total[1m]))[1h:])", "has a subquery"),
    ('rate(requests_total{direction="forward"}[1m])', "selects requests_total by direction"),
    ('rate(lost_total{direction="back"}[1m])', 'selects direction="back" of lost_total'),
    ("sum by (site) (rate(requests_total[1m]))", "groups or joins by site"),
    ("rate(requests_total[1m]) / on (direction) draining", "groups or joins by direction"),
]


def board():
    """A small dashboard without problems."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    panel = {
        "id": 1,
        "type": "timeseries",
        "title": "Requests",
        "description": "Requests a second. Normal: the same all the time.",
        "datasource": source,
        "interval": "15s",
        "gridPos": {"x": 0, "y": 0, "w": 12, "h": 8},
        "targets": [{"refId": "A", "expr": 'rate(requests_total{job="$job"}[1m])', "legendFormat": "{{peer}}"}],
        "fieldConfig": {"defaults": {"unit": "pps"}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}},
    }
    inner = copy.deepcopy(panel) | {"id": 4, "title": "Draining", "gridPos": {"x": 0, "y": 9, "w": 12, "h": 8}}
    inner["targets"][0]["expr"] = "draining"
    matrix = copy.deepcopy(panel) | {
        "id": 2,
        "type": "table",
        "title": "Matrix",
        "gridPos": {"x": 12, "y": 0, "w": 12, "h": 8},
        "options": {"showHeader": True, "cellHeight": "sm"},
        "transformations": [{"id": "groupingToMatrix", "options": {"columnField": "peer", "rowField": "instance"}}],
    }
    matrix["targets"] = [{"refId": "A", "expr": "max by (instance, peer) (draining)", "legendFormat": "__auto"}]
    row = {"id": 3, "type": "row", "title": "More", "collapsed": True, "gridPos": {"x": 0, "y": 8, "w": 24, "h": 1}, "panels": [inner]}
    query = {"query": "label_values(requests_total{}, job)", "refId": "A"}
    return {
        "uid": "pathmeter-test",
        "title": "Test",
        "schemaVersion": 39,
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "includeAll": False},
                {"name": "job", "type": "query", "datasource": source, "query": query, "includeAll": False},
            ]
        },
        "annotations": {"list": [{"name": "Draining", "datasource": source, "enable": True, "iconColor": "blue", "expr": "draining == 1", "textFormat": "{{peer}}"}]},
        "links": [{"title": "Itself", "type": "link", "url": "/d/pathmeter-test?${job:queryparam}"}],
        "panels": [panel, matrix, row],
    }


def put(path, value):
    """Changes one place in a dashboard; the value `...` removes it."""

    def change(board):
        *way, last = path
        for step in way:
            board = board[step]
        if value is ...:
            del board[last]
        else:
            board[last] = value

    return change


FIRST, SECOND, ROW = ("panels", 0), ("panels", 1), ("panels", 2)
BOARDS = [
    (put((*FIRST, "type"), "graph"), "is a graph: allowed are"),
    (put((*FIRST, "fieldConfig", "defaults", "unit"), ""), "has no unit"),
    (put((*FIRST, "description"), "Requests"), "has no description"),
    (put((*FIRST, "interval"), ...), "has no minimum interval"),
    (put((*FIRST, "targets"), []), "has no query"),
    (put((*FIRST, "datasource", "uid"), "prometheus"), "does not use the variable $datasource"),
    (put((*FIRST, "targets", 0, "datasource"), {"uid": "other"}), "queries another data source in A"),
    (put((*FIRST, "title"), "Matrix"), "has no title of its own"),
    (put((*FIRST, "id"), 4), "has the id 4 of another panel"),
    (put((*FIRST, "gridPos", "w"), 13), "lies over 'Matrix'"),
    (put((*SECOND, "gridPos", "w"), 13), "is wider than the grid"),
    (put((*FIRST, "gridPos", "h"), 23), "ends below the first screen"),
    (put((*ROW, "gridPos", "y"), 7), "lies over 'More'"),
    (put((*ROW, "panels", 0, "gridPos", "x"), 13), "is wider than the grid in More"),
    (put((*ROW, "collapsed"), False), "is a row that is not folded"),
    (put((*ROW, "panels"), []), "is a row without panels"),
    (put((*ROW, "panels", 0, "targets", 0, "expr"), "rate(draining[1m])"), "rate() of draining"),
    (put((*FIRST, "targets", 0, "expr"), 'draining{job="$jobs"}'), "uses $jobs, which is not a variable"),
    (put((*FIRST, "targets", 0, "legendFormat"), "{{direction}}"), "has label direction in its legend"),
    (put((*SECOND, "transformations", 0, "options", "rowField"), "zone"), "makes a matrix of zone"),
    (put(("schemaVersion",), 36), "has schemaVersion 36"),
    (put(("templating", "list", 0, "name"), "source"), "has no variable $datasource"),
    (put(("templating", "list", 1, "query", "query"), 'label_values(draining{instance="$instance"}, job)'), "uses $instance, which is not defined before it"),
    (put(("templating", "list", 1, "query", "query"), "label_values(requests_total{}, site)"), "groups or joins by site"),
    (put(("annotations", "list", 0, "expr"), "increase(draining[1m]) > 0"), "increase() of draining"),
    (put(("annotations", "list", 0, "datasource"), None), "does not use the variable $datasource"),
    (put(("links", 0, "url"), "/d/pathmeter-tset"), "is not one of these dashboards"),
    (put(("links", 0, "url"), "/d/pathmeter-test?var-node=a"), "sets $node, which pathmeter-test does not have"),
]

SCHEMA = [
    (put((*FIRST, "gridpos"), {}), "gridpos is not a key known to Grafana"),
    (put((*FIRST, "options", "legend", "position"), "right"), "legend.position is not a key known to Grafana"),
    (put((*FIRST, "options", "legend", "placement"), "left"), "is 'left', but Grafana expects"),
    (put((*SECOND, "options", "showHeader"), "yes"), "is 'yes', but Grafana expects"),
    (put((*ROW, "panels", 0, "gridPos", "w"), "12"), "is '12', but Grafana expects"),
]


class Planted(unittest.TestCase):
    maxDiff = None

    def test_every_planted_query_is_found(self):
        for expr, expected in QUERIES:
            with self.subTest(expr):
                found = " / ".join(check.query_problems(expr, "", METRICS, 15))
                self.assertEqual(found, "") if not expected else self.assertIn(expected, found)

    def test_every_planted_board_is_found(self):
        self.assertEqual(list(check.problems({"test": board()}, METRICS, 15)), [])
        for change, expected in BOARDS:
            with self.subTest(expected):
                changed = board()
                change(changed)
                found = " / ".join(f"{where} {what}" for _, where, what in check.problems({"test": changed}, METRICS, 15))
                self.assertIn(expected, found)

    def test_what_does_not_parse_is_found_and_named(self):
        good, bad = ("one", "sum(rate(a[1m]))"), ("two", "sum(rate(a[1m])")
        self.assertEqual(list(check.promtool_problems([good])), [])
        found = list(check.promtool_problems([good, bad]))
        self.assertEqual([where for where, _ in found], ["two"], found)

    def test_a_file_that_the_generator_does_not_make_is_found(self):
        made = {"a": "1\n", "b": "2\n"}
        self.assertEqual(list(check.generator_problems(made, dict(made))), [])
        for files, expected in [
            ({"a": "1\n", "b": "3\n"}, "is not what grafana/generate.py makes"),
            ({"a": "1\n"}, "was not run"),
            ({**made, "c": "3\n"}, "is not made by"),
        ]:
            self.assertIn(expected, " ".join(what for _, what in check.generator_problems(made, files)))

    def test_another_scrape_interval_is_found(self):
        self.assertEqual(list(check.provisioning_problems(15)), [])
        self.assertIn("timeInterval", " ".join(check.provisioning_problems(30)))

    def test_variables_are_replaced_as_grafana_does(self):
        some = {"templating": {"list": [{"name": "a", "includeAll": False}, {"name": "b", "includeAll": True, "allValue": ".*"}]}}
        for text, chosen, expected in [
            ('x{l="$a"}[$__rate_interval]', {"a": "fra.1"}, 'x{l="fra.1"}[1m]'),
            ("x{l=~`${a:regex}`}", {"a": "fra.1"}, r"x{l=~`fra\.1`}"),
            ('x{l=~"$b"}', {}, 'x{l=~".*"}'),
            ('x{l=~"$b"}', {"b": "All"}, 'x{l=~".*"}'),
            ('x{l=~"${b}"}', {"b": "fra.1"}, r'x{l=~"fra\\.1"}'),
            ('label_replace(x, "a", "$1", "b", "(.+)")', {}, 'label_replace(x, "a", "$1", "b", "(.+)")'),
        ]:
            self.assertEqual(check.replace(text, some, chosen), expected)
        for text in ("$a", "$c"):
            self.assertRaises(KeyError, check.replace, text, some, {})

    @unittest.skipUnless(importlib.util.find_spec("grafana_foundation_sdk"), "no grafana-foundation-sdk")
    def test_every_planted_key_and_type_is_found(self):
        self.assertEqual(list(check.schema_problems(board())), [])
        for change, expected in SCHEMA:
            with self.subTest(expected):
                changed = board()
                change(changed)
                self.assertIn(expected, " / ".join(f"{where} {what}" for where, what in check.schema_problems(changed)))


if __name__ == "__main__":
    unittest.main()
