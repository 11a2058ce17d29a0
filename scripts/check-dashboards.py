#!/usr/bin/env python3
"""Checks grafana/dashboards/*.json against the generator, the grid, the documentation of metrics and promtool.

  check-dashboards.py                      all checks but the schema
  check-dashboards.py --schema             against Grafana's own types; needs grafana-foundation-sdk
  check-dashboards.py --list --set instance=fra-1 --set peer=ams-1
                                           every query as JSON, with Grafana's variables replaced

Default values: job is pathmeter, probe, family and what can be All by .*, $__rate_interval by 1m, $__range by 1h.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

sys.dont_write_bytecode = True
ROOT = Path(__file__).resolve().parent.parent
DASHBOARDS = ROOT / "grafana/dashboards"

PANEL_TYPES = {"timeseries", "stat", "table", "heatmap", "state-timeline", "bargauge", "text", "row"}
SCREEN_ROWS, COLUMNS = 22, 24  # what 1920 by 1080 shows
SCHEMA_VERSION = 39  # of Grafana 10.4
SCRAPES_IN_A_WINDOW = 4

# --- Series in Prometheus

# Labels added by a scrape.
TARGET_LABELS = {"job", "instance", "zone"}
PATH_LABELS = {"probe", "peer", "family"}


@dataclass
class Metric:
    kind: str  # counter, gauge, histogram, summary; recorded series are gauges
    labels: set
    values: dict = field(default_factory=dict)  # of labels whose values are documented


# Metrics of Prometheus itself. Alerts have the labels of the series that caused them.
BUILT_IN = {
    "up": Metric("gauge", set()),
    "ALERTS": Metric("gauge", {"alertname", "alertstate", "severity", "peer_zone", *PATH_LABELS}),
    "ALERTS_FOR_STATE": Metric("gauge", {"alertname", "severity", "peer_zone", *PATH_LABELS}),
}


def documented():
    """The metrics in the tables of docs/reference/metrics.md."""
    metrics = {}
    for line in (ROOT / "docs/reference/metrics.md").read_text(encoding="utf-8").splitlines():
        row = re.match(r"\| `(\w+)` \| (counter|gauge|histogram|summary) \|([^|]*)\|", line)
        if not row:
            continue
        name, kind, cell = row.groups()
        labels, values, label = set(), {}, None
        for word in filter(None, (word.strip() for word in cell.split(","))):
            if ":" in word:
                label, first = (part.strip() for part in word.split(":"))
                labels.add(label)
                values[label] = {first}
            elif label:
                values[label].add(word)
            else:
                labels |= PATH_LABELS if word == "path" else {word}
        metrics[name] = Metric(kind, labels, values)
    return metrics


def recorded():
    """The series of the recording rules. The name of a series tells its labels."""
    metrics = {}
    for file in sorted((ROOT / "deploy/prometheus/rules").glob("*.rules.yaml")):
        for name in re.findall(r"^\s*(?:- )?record: *[\"']?([\w:]+)", file.read_text(encoding="utf-8"), re.MULTILINE):
            labels = {"peer", "peer_zone", "direction", *PATH_LABELS}
            metrics[name] = Metric("gauge", labels)
    return metrics


# --- PromQL, parsed just enough to know which function is applied to which metric. promtool checks the
# syntax.

TOKEN = re.compile(
    r"""(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|`[^`]*`)
      | (?P<number>\d[\d.]*(?:e[+-]?\d+)?[a-z]*)
      | (?P<name>[A-Za-z_:][\w:]*)
      | (?P<mark>=~|!~|!=|==|<=|>=|[-+*/%^(){}\[\],=<>@:])
      | (?P<space>\s+)""",
    re.VERBOSE,
)
AGGREGATIONS = set("sum min max avg count group stddev stdvar topk bottomk quantile count_values".split())
LABEL_LISTS = set("by without on ignoring group_left group_right".split())
WORDS = set("and or unless bool offset start end inf nan".split())
OF_COUNTERS = {"rate", "increase", "irate", "resets"}
OF_GAUGES = set("changes delta deriv idelta predict_linear".split())
COUNTING = {"count", "group", "absent"}


@dataclass
class Selector:
    metric: str
    matchers: list  # of (label, operator, value)
    window: str | None
    inside: list  # of (function or aggregation, its labels), outermost first


@dataclass
class Expression:
    selectors: list
    labels: set  # named in by, on and the like
    made: set  # by label_replace
    subquery: bool


def read(expr):
    tokens = [(match.lastgroup, match.group()) for match in TOKEN.finditer(expr) if match.lastgroup != "space"]
    found = Expression([], set(), set(), False)
    around, waiting, at = [], [None, set()], 0

    def token(place):
        return tokens[place] if place < len(tokens) else ("end", "")

    def label_list(place):
        names = set()
        while token(place)[1] not in (")", ""):
            if token(place)[0] == "name":
                names.add(token(place)[1])
            place += 1
        return names, place + 1

    while at < len(tokens):
        kind, text = tokens[at]
        at += 1
        if text == "(":
            around.append(tuple(waiting))
            waiting = [None, set()]
        elif text == ")":
            around and around.pop()
            found.subquery |= token(at)[1] == "["
        elif kind != "name" or text.lower() in WORDS:
            continue
        elif text in LABEL_LISTS:
            if token(at)[1] == "(":
                names, at = label_list(at + 1)
                found.labels |= names
                if text == "by":
                    waiting[1] |= names
        elif text in AGGREGATIONS or token(at)[1] == "(":
            waiting = [text, set()]
            if text == "label_replace":
                found.made |= {match.group(1) for match in re.finditer(r'label_replace\(.*?, "(\w+)", "', expr)}
        else:
            matchers, window = [], None
            if token(at)[1] == "{":
                at += 1
                while token(at)[1] not in ("}", ""):
                    if token(at)[0] == "name":
                        matchers.append((token(at)[1], token(at + 1)[1], token(at + 2)[1].strip("\"'`")))
                        at += 3
                    else:
                        at += 1
                at += 1
            if token(at)[1] == "[":
                window = token(at + 1)[1]
                while token(at)[1] not in ("]", ""):
                    at += 1
                at += 1
            found.selectors.append(Selector(text, matchers, window, list(around)))
    return found


def seconds(window):
    unit = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
    parts = re.findall(r"(\d+)(ms|[smhdw])", window)
    return sum(int(number) * unit[name] for number, name in parts) if parts else None


def query_problems(expr, legend, metrics, scrape):
    """Problems of one query, with its variables replaced."""
    expression = read(expr)
    if expression.subquery:
        yield "has a subquery, which is expensive: record its inner expression"
    labels = TARGET_LABELS | expression.made
    for selector in expression.selectors:
        name = selector.metric
        metric, part = metrics.get(name), ""
        if metric is None:
            base = re.fullmatch(r"(\w+)_(bucket|sum|count)", name)
            metric = metrics.get(base[1]) if base else None
            if metric is None or metric.kind not in ("histogram", "summary") or (base[2] == "bucket" and metric.kind == "summary"):
                yield f"uses {name}, which is neither in docs/reference/metrics.md nor a recording rule"
                continue
            part = base[2]
        elif metric.kind in ("histogram", "summary"):
            yield f"uses {name}, a {metric.kind}, without _bucket, _sum or _count"
            continue
        counts = bool(part) or metric.kind == "counter"
        known = metric.labels | TARGET_LABELS | ({"le"} if part == "bucket" else set())
        labels |= known
        for label, operator, value in selector.matchers:
            if label not in known and not any(one.endswith("*") and label.startswith(one[:-1]) for one in known):
                yield f"selects {name} by {label}, a label that it does not have"
            allowed = metric.values.get(label)
            if allowed and operator in ("=", "!=") and value not in allowed:
                yield f'selects {label}="{value}" of {name}, which is none of its values'
        functions = [name for name, _ in selector.inside if name]
        direct = functions[-1] if functions else "nothing"
        if selector.window:
            if direct in OF_COUNTERS and not counts:
                yield f"has {direct}() of {name}, which is not a counter"
            elif counts and direct not in OF_COUNTERS:
                yield f"has {direct}() of {name}, a counter"
            elif not counts and direct not in OF_GAUGES and not direct.endswith("_over_time"):
                yield f"has a window of {name} in {direct}()"
            length = seconds(selector.window)
            if length is None or length < SCRAPES_IN_A_WINDOW * scrape:
                yield f"has a window of {selector.window}, too short for {SCRAPES_IN_A_WINDOW} scrapes"
        elif counts and not COUNTING & set(functions):
            yield f"shows {name} itself, which only grows: take its rate()"
        if "histogram_quantile" in functions:
            if part != "bucket" or not {"rate", "increase"} & set(functions):
                yield f"has a quantile of {name} without a rate of its buckets: it covers all time since the start"
            kept = [labels for name, labels in selector.inside if name in AGGREGATIONS]
            inner = kept[-1] if kept and functions.index("histogram_quantile") < max(functions.index(f) for f in functions if f in AGGREGATIONS) else None
            if inner is not None and "le" not in inner:
                yield f"sums the buckets of {name} without le"
    for label in expression.labels - labels:
        if not any(one.endswith("*") and label.startswith(one[:-1]) for one in labels):
            yield f"groups or joins by {label}, which none of its metrics has"
    for label in re.findall(r"{{(\w+)}}", legend):
        if label not in labels:
            yield f"has label {label} in its legend, which none of its metrics has"


def promtool_problems(queries):
    """Problems that promtool finds in all queries. `queries`: pairs of (where, expression)."""
    rules = [{"record": f"check:query_{number}", "expr": expr} for number, (_, expr) in enumerate(queries)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "queries.rules.yaml"
        # JSON is valid YAML.
        file.write_text(json.dumps({"groups": [{"name": "dashboards", "rules": rules}]}), encoding="utf-8")
        ran = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True)
    if ran.returncode == 0:
        return
    output = ran.stdout + ran.stderr
    match = re.findall(r'rule (\d+), "check:query_(\d+)": (.*)', output)
    for _, number, what in match:
        yield queries[int(number)][0], f"does not parse: {what}"
    if not match:
        yield "promtool", output.strip()


# --- Grafana's variables


def variables(board):
    return {one["name"]: one for one in board["templating"]["list"]}


def replace(text, board, chosen):
    """As Grafana's data source does it: a value of a variable with All is a regular expression, and every backslash is doubled."""

    def one(match):
        name, form = match["name"] or match["braced"], match["form"]
        if name.isdigit():  # of label_replace
            return match[0]
        if name.startswith("__"):
            return {"__rate_interval": "1m", "__interval": "15s", "__range": "1h", **chosen}.get(name, match[0])
        if name not in variables(board):
            raise KeyError(f"${name} is not a variable of this dashboard")
        value = chosen.get(name, "All")
        if value == "All" and variables(board)[name]["includeAll"]:
            return variables(board)[name]["allValue"]
        if variables(board)[name]["includeAll"]:
            return re.sub(r"[$^*{}\[\]'+?.()|]", r"\\\\\g<0>", value)
        if name not in chosen:
            value = {"job": "pathmeter", "probe": ".*", "family": ".*"}.get(name)
        if value is None:
            raise KeyError(f"${name} needs a value: --set {name}=…")
        return re.sub(r"[\\^$*+?.()|\[\]{}/]", r"\\\g<0>", value) if form == "regex" else value

    return re.sub(r"\$(?:(?P<name>\w+)|\{(?P<braced>\w+)(?::(?P<form>\w+))?\})", one, text)


PLACEHOLDERS = {"instance": "fra-1.example.net", "peer": "ams-1"}


# --- The dashboards themselves


def panels_of(board):
    """Pairs of (panel, collapsed row that contains it or None)."""
    for panel in board["panels"]:
        yield panel, None
        for inner in panel.get("panels", []):
            yield inner, panel


def grid_problems(board):
    def overlap(one, other):
        a, b = one["gridPos"], other["gridPos"]
        return a["x"] < b["x"] + b["w"] and b["x"] < a["x"] + a["w"] and a["y"] < b["y"] + b["h"] and b["y"] < a["y"] + a["h"]

    layers = [("the first screen", board["panels"])] + [(row["title"], row["panels"]) for row in board["panels"] if row["type"] == "row"]
    for place, panels in layers:
        for number, panel in enumerate(panels):
            position = panel["gridPos"]
            if position["x"] < 0 or position["x"] + position["w"] > COLUMNS:
                yield panel["title"], f"is wider than the grid in {place}"
            for other in panels[number + 1 :]:
                if overlap(panel, other):
                    yield panel["title"], f"lies over {other['title']!r} in {place}"
    for panel in board["panels"]:
        if panel["type"] != "row" and panel["gridPos"]["y"] + panel["gridPos"]["h"] > SCREEN_ROWS:
            yield panel["title"], f"ends below the first screen of {SCREEN_ROWS} rows"
        if panel["type"] == "row" and not panel["collapsed"]:
            yield panel["title"], "is a row that is not folded"
        if panel["type"] == "row" and not panel["panels"]:
            yield panel["title"], "is a row without panels"


def panel_problems(board):
    seen_ids, seen_titles = set(), set()
    for panel, _ in panels_of(board):
        title = panel.get("title", "")
        if panel["id"] in seen_ids:
            yield title, f"has the id {panel['id']} of another panel"
        seen_ids.add(panel["id"])
        if panel["type"] == "row":
            continue
        if not title or title in seen_titles:
            yield title, "has no title of its own"
        seen_titles.add(title)
        if panel["type"] not in PANEL_TYPES:
            yield title, f"is a {panel['type']}: allowed are {', '.join(sorted(PANEL_TYPES))}"
        if panel["type"] == "text":
            continue
        if panel.get("datasource") != {"type": "prometheus", "uid": "${datasource}"}:
            yield title, "does not use the variable $datasource"
        for target in panel.get("targets", []):
            if target.get("datasource", panel.get("datasource")) != panel.get("datasource"):
                yield title, f"queries another data source in {target['refId']}"
        if not panel["fieldConfig"]["defaults"].get("unit"):
            yield title, "has no unit"
        if len(panel.get("description", "")) < 30:
            yield title, "has no description of normal values"
        if not panel.get("interval"):
            yield title, "has no minimum interval"
        if not panel.get("targets"):
            yield title, "has no query"


def board_problems(board, boards):
    names = list(variables(board))
    if board["schemaVersion"] < SCHEMA_VERSION:
        yield "dashboard", f"has schemaVersion {board['schemaVersion']}, older than {SCHEMA_VERSION}"
    if "datasource" not in names:
        yield "dashboard", "has no variable $datasource"
    for place, name in enumerate(names):
        definition = json.dumps(variables(board)[name].get("query", ""))
        for used in re.findall(r"\$\{?(\w+)", definition):
            if used not in names[:place]:
                yield f"variable {name}", f"uses ${used}, which is not defined before it"
    for one in board["annotations"]["list"]:
        if one.get("datasource") != {"type": "prometheus", "uid": "${datasource}"}:
            yield f"annotation {one['name']}", "does not use the variable $datasource"
    by_uid = {one["uid"]: one for one in boards}
    text = json.dumps(board, ensure_ascii=False)
    for url in set(re.findall(r'"url": "([^"]*)"', text)):
        uid, _, rest = url.removeprefix("/d/").partition("?")
        if not url.startswith("/d/") or uid not in by_uid:
            yield "link", f"{url} is not one of these dashboards"
            continue
        for name in re.findall(r"var-(\w+)=", rest) + re.findall(r"\$\{(\w+):queryparam\}", rest):
            if name not in variables(by_uid[uid]):
                yield "link", f"{url} sets ${name}, which {uid} does not have"
    for panel, _ in panels_of(board):
        for target in panel.get("targets", []):
            for name in re.findall(r"\$\{?(\w+)", target["expr"]):
                if not name.startswith("__") and not name.isdigit() and name not in names:
                    yield panel["title"], f"uses ${name}, which is not a variable of this dashboard"
        for step in panel.get("transformations", []):
            for key in ("columnField", "rowField"):
                label = step["options"].get(key)
                if label and label not in read(replace(panel["targets"][0]["expr"], board, PLACEHOLDERS)).labels:
                    yield panel["title"], f"makes a matrix of {label}, which its query does not keep"


def queries_of(board):
    """Triples of (where, expression, legend) of panels, annotations and variables."""
    for panel, _ in panels_of(board):
        for target in panel.get("targets", []):
            legend = target["legendFormat"].replace("__auto", "")
            yield f"{panel['title']} {target['refId']}", target["expr"], legend
    for one in board["annotations"]["list"]:
        yield f"annotation {one['name']}", one["expr"], one["textFormat"]
    for one in board["templating"]["list"]:
        if one["type"] == "query":
            selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", one["query"]["query"]).groups()
            yield f"variable {one['name']}", f"group by ({label}) ({selector.replace('{}', '')})", ""


def problems(boards, metrics, scrape):
    """Problems as (dashboard, where, what): all checks but the generator and promtool."""
    for name, board in boards.items():
        for where, what in [*grid_problems(board), *panel_problems(board), *board_problems(board, boards.values())]:
            yield name, where, what
        for where, expr, legend in queries_of(board):
            try:
                expr = replace(expr, board, PLACEHOLDERS)
            except KeyError as error:
                yield name, where, error.args[0]
                continue
            for what in query_problems(expr, legend, metrics, scrape):
                yield name, where, what


# --- Grafana's own types


def schema_problems(board):
    """Reads a dashboard into the types that Grafana publishes for Python: keys that these do not know, and values of another type."""
    import enum
    import types
    import typing

    from grafana_foundation_sdk.cog import plugins
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    # Grafana's Prometheus data source has its own types for these.
    ours = re.compile(r"annotations\.list\[\d+\]\.(expr|step|titleFormat|textFormat|tagKeys|useValueForTime)$")

    plugins.register_default_plugins()
    model = Dashboard.from_json(board)
    again = json.loads(json.dumps(model, cls=JSONEncoder))

    def lost(before, after, path):
        if isinstance(before, dict):
            for key, value in before.items():
                where = f"{path}.{key}" if path else key
                if not isinstance(after, dict) or key not in after:
                    if not ours.match(where):
                        yield where, "is not a key known to Grafana here"
                else:
                    yield from lost(value, after[key], where)
        elif isinstance(before, list):
            for number, (one, other) in enumerate(zip(before, after, strict=True)):
                yield from lost(one, other, f"{path}[{number}]")

    def fits(value, kind):
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if origin in (typing.Union, types.UnionType):
            return any(fits(value, one) for one in inner)
        if origin is typing.Literal:
            return value in inner
        if origin is list:
            return isinstance(value, list) and all(fits(one, inner[0]) for one in value)
        if origin is dict:
            return isinstance(value, dict)
        if kind is float:
            return isinstance(value, (int, float))
        if kind is int:
            return isinstance(value, int)
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            return value in [one.value for one in kind]
        if isinstance(value, dict) and getattr(kind, "__module__", "").startswith("grafana_foundation_sdk"):
            return True  # transformations are left as they are
        return not isinstance(kind, type) or isinstance(value, kind)

    def misfits(value, path):
        if isinstance(value, list):
            for number, one in enumerate(value):
                yield from misfits(one, f"{path}[{number}]")
        elif isinstance(value, dict):
            for key, one in value.items():
                yield from misfits(one, f"{path}.{key}")
        elif type(value).__module__.startswith("grafana_foundation_sdk") and not isinstance(value, enum.Enum):
            for name, kind in typing.get_type_hints(type(value)).items():
                if hasattr(value, name):
                    one = getattr(value, name)
                    if not fits(one, kind) and not hasattr(one, "to_json"):
                        yield f"{path}.{name}", f"is {one!r}, but Grafana expects {kind}"
                    yield from misfits(one, f"{path}.{name}")

    yield from lost(board, again, "")
    yield from misfits(model, "dashboard")


# --- The command


def generator():
    place = ROOT / "grafana/generate.py"
    spec = importlib.util.spec_from_file_location("generate", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generator_problems(made, files):
    """Compares generated dashboards with files; both are texts by name."""
    for name in sorted(made.keys() | files.keys()):
        if name not in files:
            yield name, "grafana/generate.py was not run: the file does not exist"
        elif name not in made:
            yield name, "is not made by grafana/generate.py"
        elif made[name] != files[name]:
            yield name, "is not what grafana/generate.py makes: change boards/, run it, commit both"


def scrape_interval(made):
    """The scrape interval in seconds, in the panels and in the provisioned data source."""
    return seconds(next(panel["interval"] for panel in made["panels"] if "interval" in panel))


def provisioning_problems(scrape):
    text = (ROOT / "grafana/provisioning/datasources/prometheus.yaml").read_text(encoding="utf-8")
    match = re.search(r"timeInterval: (\w+)", text)
    if not match or seconds(match[1]) != scrape:
        yield "timeInterval of provisioning/datasources/prometheus.yaml is not the interval of the panels"
    text = (ROOT / "grafana/provisioning/dashboards/pathmeter.yaml").read_text(encoding="utf-8")
    if "path: /var/lib/grafana/dashboards\n" not in text:
        yield "provisioning/dashboards/pathmeter.yaml does not read /var/lib/grafana/dashboards"


def check():
    module = generator()
    made = {name: module.text(board) for name, board in module.boards().items()}
    files = {file.stem: file.read_text(encoding="utf-8") for file in DASHBOARDS.glob("*.json")}
    boards = {name: json.loads(text) for name, text in files.items()}
    metrics = {**documented(), **recorded(), **BUILT_IN}
    scrape = scrape_interval(next(iter(boards.values())))

    found = [f"{name}.json {what}" for name, what in generator_problems(made, files)]
    found += provisioning_problems(scrape)
    found += [f"{name}.json: {where}: {what}" for name, where, what in problems(boards, metrics, scrape)]
    queries = []
    if not found:
        for name, board in boards.items():
            queries += [(f"{name}.json: {where}", replace(expr, board, PLACEHOLDERS)) for where, expr, _ in queries_of(board)]
        found += [f"{where}: {what}" for where, what in promtool_problems(queries)]
    for line in found:
        print(f"error: {line}", file=sys.stderr)
    if not found:
        panels = sum(1 for board in boards.values() for panel, _ in panels_of(board) if panel["type"] != "row")
        print(f"{len(boards)} dashboards, {panels} panels, {len(queries)} queries: no problems")
    return 1 if found else 0


def check_schema():
    found = []
    for file in sorted(DASHBOARDS.glob("*.json")):
        found += [f"{file.name}: {where} {what}" for where, what in schema_problems(json.loads(file.read_text(encoding="utf-8")))]
    for line in found:
        print(f"error: {line}", file=sys.stderr)
    if not found:
        print("the dashboards match Grafana's types")
    return 1 if found else 0


def listing(chosen):
    """The queries that a test with a Prometheus can send."""
    module = generator()
    entries = []
    for name, board in module.boards().items():
        for panel, letter, query in board.queries:
            entries.append(
                {
                    "dashboard": name,
                    "panel": panel,
                    "refId": letter,
                    "expr": replace(query.expr, board.json, chosen),
                    "kind": "instant" if query.instant else "range",
                    "expectsData": query.expects,
                }
            )
    return entries


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schema", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="VARIABLE=VALUE")
    options = parser.parse_args()
    if options.schema:
        return check_schema()
    if options.list:
        try:
            chosen = dict(one.split("=", 1) for one in options.set)
            print(json.dumps(listing(chosen), indent=1, ensure_ascii=False))
        except (KeyError, ValueError) as error:
            print(f"error: {error.args[0]}", file=sys.stderr)
            return 2
        return 0
    return check()


if __name__ == "__main__":
    sys.exit(main())
