"""Building blocks of the dashboards: panels, units, colours, thresholds, links and the grid."""

from dataclasses import dataclass, field

# Grafana 10.4 and later read this as it is, or bring it up to date by themselves.
SCHEMA_VERSION = 39
PLUGIN_VERSION = "10.4.0"
# Scrape interval. No graph has points closer together. Also in provisioning/datasources.
SCRAPE_INTERVAL = "15s"

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

# --- When a query has a result. The test that runs all queries expects only results that its mesh can have.

ALWAYS = "always"
STREAMS = "streams"  # probes over tcp, websocket or http
PATH_MTU = "path_mtu"  # probes with path_mtu
TRACES = "traces"  # probes of kind trace
HOPS = "hops"  # probes of kind trace with hop_metrics
BANDWIDTH = "bandwidth"  # probes of kind bandwidth
TROUBLE = "trouble"  # only during or after an incident
ZONES = "zones"  # agents that have a zone
GROUPS = "groups"  # metrics.level: group
DISCOVERY = "discovery"  # providers other than the list in the configuration
TLS = "tls"  # HTTPS, served or probed

# --- Units

SECONDS = "s"
SHARE = "percentunit"
DATAGRAMS = "pps"
REQUESTS = "reqps"
EVENTS = "cps"
BYTES = "bytes"
BYTES_PER_SECOND = "Bps"
BITS_PER_SECOND = "bps"
PACKET = "suffix: B"  # a length of 1500 is read as 1500, not as 1.46 KiB
HEX = "hex"
NUMBER = "short"
TEXT = "string"

# --- Thresholds: each colour applies from its value on

GREEN, YELLOW, ORANGE, RED, BLUE, PURPLE, GREY = "green", "yellow", "orange", "red", "blue", "purple", "#8e8e8e"

PLAIN = [(None, "text")]
LOSS = [(None, GREEN), (0.001, YELLOW), (0.01, ORANGE), (0.05, RED)]
LOSS_HIGH = 0.01  # from this ratio on a pair counts as having loss, as in the alerts
NONE_IS_WELL = [(None, GREEN), (1e-9, RED)]
FEW_ARE_ODD = [(None, GREEN), (1e-9, YELLOW)]
ONE_IS_WELL = [(None, RED), (1, GREEN)]
LATE_WAKEUPS = [(None, GREEN), (0.001, YELLOW), (0.01, RED)]
TURNAROUND = [(None, GREEN), (0.005, YELLOW), (0.05, RED)]
SILENCE = [(None, GREEN), (30, YELLOW), (120, RED)]
MOST = [(None, GREEN), (0.2, YELLOW), (0.5, RED)]
STAMPS = [(None, GREEN), (0.01, YELLOW), (0.05, RED)]
FULL = [(None, GREEN), (0.7, YELLOW), (0.9, RED)]
CERTIFICATE = [(None, RED), (7 * 86400, YELLOW), (21 * 86400, GREEN)]

# Whether an RTT is good depends on the distance: darker is longer, without judgement.
SHADES = "continuous-blues"

# --- Colours of series with the same name on all dashboards

COLOURS = {
    "forward": ORANGE, "reverse": PURPLE, "unknown": GREY,
    "up": GREEN, "down": RED, "draining": BLUE, "unresolved": YELLOW,
    "ok": GREEN, "late": YELLOW, "lost": RED, "host-dropped": PURPLE, "withdrawn": GREY,
    "p50": "light-blue", "p90": BLUE, "p99": "dark-blue",
    "to peers": BLUE, "from peers": ORANGE,
    "forward: capacity": ORANGE, "forward: at least": "light-orange", "forward: usual": GREY,
    "reverse: capacity": PURPLE, "reverse: at least": "light-purple", "reverse: usual": GREY,
}  # fmt: skip
# Thresholds of single numbers by their name.
SINGLE = {
    "up": [(None, GREEN)], "scraped": [(None, GREEN)],
    "draining": [(None, GREEN), (1, BLUE)], "unresolved": [(None, GREEN), (1, YELLOW)],
}  # fmt: skip
VALUES = {
    "{{direction}}": ["forward", "reverse", "unknown"],
    "{{direction}}: capacity": ["forward: capacity", "reverse: capacity"],
    "{{direction}}: at least": ["forward: at least", "reverse: at least"],
    "{{direction}}: usual": ["forward: usual", "reverse: usual"],
    "{{state}}": ["up", "down", "draining", "unresolved"],
}

# --- Links

FLEET, PAIR, NODE, AGENT = "pathmeter-fleet", "pathmeter-pair", "pathmeter-node", "pathmeter-agent"
_KEEP = "${datasource:queryparam}&${job:queryparam}"


def cell(name):
    """The value of another column in the same row."""
    return f"${{__data.fields.{name}}}"


ROW_NAME = "${__data.fields[0]}"
COLUMN_NAME = "${__field.name}"


def to_pair(instance, peer, probe="", family=""):
    url = f"/d/{PAIR}?{_KEEP}&var-instance={instance}&var-peer={peer}"
    url += f"&var-probe={probe}" if probe else ""
    url += f"&var-family={family}" if family else ""
    return {"title": f"{instance} → {peer}", "url": url + "&${__url_time_range}"}


def to_zone(zone):
    return {"title": f"Agents of zone {zone}", "url": f"/d/{FLEET}?{_KEEP}&var-zone={zone}&${{__url_time_range}}"}


def to_node(instance):
    return {"title": f"{instance}: node", "url": f"/d/{NODE}?{_KEEP}&var-instance={instance}&${{__url_time_range}}"}


def to_agent(instance):
    return {"title": f"{instance}: agent", "url": f"/d/{AGENT}?{_KEEP}&var-instance={instance}&${{__url_time_range}}"}


# --- Queries


@dataclass
class Query:
    expr: str
    legend: str = ""
    expects: str = ALWAYS
    format: str = "time_series"
    instant: bool = False


def query(expr, legend="", expects=ALWAYS):
    return Query(expr, legend, expects)


# --- Panels


@dataclass
class Panel:
    json: dict
    queries: list = field(default_factory=list)


def timeseries(title, unit, description, *queries, stack=False, bars=False, thresholds=None, log=False, low=0, high=None):
    custom = {
        "drawStyle": "bars" if bars else "line",
        "lineWidth": 0 if bars else 1,
        "fillOpacity": 80 if bars else 40 if stack else 8,
        "lineInterpolation": "linear",
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if stack else "none", "group": "A"},
        "scaleDistribution": {"type": "log", "log": 10} if log else {"type": "linear"},
        "thresholdsStyle": {"mode": "line" if thresholds else "off"},
    }
    options = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    defaults = {"color": {"mode": "palette-classic"}, "custom": custom}
    if not log and low is not None:
        defaults["min"] = low
    if high is not None:
        defaults["max"] = high
    return _panel("timeseries", title, unit, description, queries, options, defaults, thresholds or PLAIN, _colours(queries))


def stat(title, unit, description, *queries, thresholds=PLAIN, graph=False, mappings=(), background=False, links=(), names=None, decimals=None):
    """One number for each query, or for each series of one; its legend is shown where there are several."""
    plain = thresholds is PLAIN
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "orientation": "auto",
        "textMode": names or ("value_and_name" if len(queries) > 1 or "{{" in queries[0].legend else "value"),
        "colorMode": "none" if plain else "background" if background else "value",
        "graphMode": "area" if graph else "none",
        "justifyMode": "auto",
        "wideLayout": False,
    }
    defaults = {"color": {"mode": "thresholds"}}
    if mappings:
        defaults["mappings"] = list(mappings)
    if links:
        defaults["links"] = list(links)
    if decimals is not None:
        defaults["decimals"] = decimals
    own = [_override(name, ("thresholds", _steps(SINGLE[name]))) for name in _names(queries) if name in SINGLE]
    return _panel("stat", title, unit, description, queries, options, defaults, thresholds, own)


def names_of(title, description, *queries):
    """A stat that shows the names of the series, not their values."""
    return stat(title, TEXT, description, *queries, names="name")


def bargauge(title, unit, description, *queries, thresholds=PLAIN, links=(), high=None):
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "orientation": "horizontal",
        "displayMode": "basic",
        "valueMode": "color",
        "showUnfilled": True,
        "minVizWidth": 8,
        "minVizHeight": 16,
        "namePlacement": "left",
        "sizing": "auto",
    }
    defaults = {"color": {"mode": "thresholds"}, "min": 0, "links": list(links)}
    if high is not None:
        defaults["max"] = high
    return _panel("bargauge", title, unit, description, _instant(queries), options, defaults, thresholds)


def heatmap(title, unit, description, expr, expects=ALWAYS):
    """Of a classic histogram: one row for each bucket."""
    options = {
        "calculate": False,
        "color": {"mode": "scheme", "scheme": "Blues", "scale": "exponential", "exponent": 0.5, "fill": "blue", "steps": 64, "reverse": False},
        "yAxis": {"axisPlacement": "left", "unit": unit},
        "rowsFrame": {"layout": "auto"},
        "cellGap": 1,
        "filterValues": {"le": 1e-9},
        "legend": {"show": False},
        "tooltip": {"mode": "single", "yHistogram": True, "showColorScale": False},
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
        "showValue": "never",
    }
    queries = [Query(expr, "{{le}}", expects, "heatmap")]
    return _panel("heatmap", title, NUMBER, description, queries, options, {"custom": {"scaleDistribution": {"type": "linear"}}}, PLAIN)


def state_timeline(title, description, *queries, mappings=(), unit=NUMBER):
    """A bar for each series. Without mappings, each value has a shade of its own."""
    options = {
        "mergeValues": True,
        "showValue": "never",
        "alignValue": "left",
        "rowHeight": 0.8,
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "single", "sort": "none"},
    }
    defaults = {
        "color": {"mode": "thresholds" if mappings else SHADES},
        "custom": {"lineWidth": 0, "fillOpacity": 80},
        "mappings": list(mappings),
    }
    return _panel("state-timeline", title, unit, description, queries, options, defaults, PLAIN)


@dataclass
class Column:
    """Of a table. `name` is the label, or the query's letter."""

    name: str
    title: str
    unit: str = TEXT
    thresholds: list = None
    shades: bool = False
    width: int = None
    links: tuple = ()


def table(title, description, *queries, columns, sort, ascending=False, numeric=()):
    """Rows of equal labels become one row; its columns are labels and the queries' values, in the order given. `sort`: titles, largest first unless
    `ascending`. `numeric`: labels to sort as numbers."""
    several = len(queries) > 1

    def field_name(column):
        is_value = len(column.name) == 1
        return column.name if not is_value else f"Value #{column.name}" if several else "Value"

    shown = {field_name(column): column for column in columns}
    values = [f"Value #{chr(ord('A') + index)}" for index in range(len(queries))] if several else ["Value"]
    hidden = {"Time": True} | {value: True for value in values if value not in shown}
    overrides = [_override(column.title, *_properties(column)) for column in columns]
    conversions = [{"targetField": label, "destinationType": "number"} for label in numeric]
    transformations = ([{"id": "merge", "options": {}}] if several else []) + [
        *([{"id": "convertFieldType", "options": {"fields": {}, "conversions": conversions}}] if numeric else []),
        {
            "id": "organize",
            "options": {
                "excludeByName": hidden,
                "indexByName": {name: place for place, name in enumerate(shown)},
                "renameByName": {name: column.title for name, column in shown.items()},
            },
        }
    ]
    options = {
        "showHeader": True,
        "cellHeight": "sm",
        "sortBy": [{"displayName": title, "desc": not ascending} for title in sort],
    }
    defaults = {"custom": {"align": "auto", "cellOptions": {"type": "auto"}, "inspect": False}, "noValue": "–"}
    panel = _panel("table", title, TEXT, description, _instant(queries, "table"), options, defaults, PLAIN, overrides)
    panel.json["transformations"] = transformations
    return panel


def matrix(title, unit, description, expr, rows, columns, *, thresholds=None, links=(), row_links=(), expects=ALWAYS):
    """One row for each value of the label `rows`, one column for each of `columns`; the colour is the value's."""
    corner = f"{rows}\\{columns}"
    options = {
        "showHeader": True,
        "cellHeight": "sm",
        "sortBy": [{"displayName": corner, "desc": False}],
    }
    defaults = {
        "color": {"mode": "thresholds" if thresholds else SHADES},
        "custom": {"align": "center", "cellOptions": {"type": "color-background", "mode": "basic"}, "minWidth": 70, "inspect": False},
        "links": list(links),
        "noValue": "",
    }
    first = _override(corner, ("unit", TEXT), ("custom.cellOptions", {"type": "auto"}), ("custom.align", "left"), ("links", list(row_links)))
    panel = _panel(
        "table", title, unit, description, [Query(expr, "", expects, "table", True)], options, defaults, thresholds or PLAIN, [first]
    )
    panel.json["transformations"] = [
        {"id": "sortBy", "options": {"fields": {}, "sort": [{"field": columns}]}},
        {"id": "groupingToMatrix", "options": {"columnField": columns, "rowField": rows, "valueField": "Value", "emptyValue": "null"}},
    ]
    return panel


def value(number, text, colour):
    """A value mapping: text to show instead of a number."""
    return {"type": "value", "options": {str(number): {"text": text, "color": colour, "index": 0}}}


def _panel(kind, title, unit, description, queries, options, defaults, thresholds, overrides=()):
    queries = list(queries)
    defaults = {"unit": unit, "thresholds": _steps(thresholds), **defaults}
    targets = []
    for letter, one in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", queries, strict=False):
        targets.append(
            {
                "refId": letter,
                "expr": one.expr,
                "legendFormat": one.legend or "__auto",
                "format": one.format,
                "instant": one.instant,
                "range": not one.instant,
            }
        )
    body = {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "pluginVersion": PLUGIN_VERSION,
        "interval": SCRAPE_INTERVAL,
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": list(overrides)},
        "options": options,
    }
    return Panel(body, queries)


def _instant(queries, format="time_series"):
    return [Query(one.expr, one.legend, one.expects, format, True) for one in queries]


def _names(queries):
    """Names of the series, as far as known from the legends."""
    return [name for one in queries for name in VALUES.get(one.legend, [one.legend])]


def _colours(queries):
    return [_override(name, ("color", {"mode": "fixed", "fixedColor": COLOURS[name]})) for name in _names(queries) if name in COLOURS]


def _steps(thresholds):
    return {"mode": "absolute", "steps": [{"value": at, "color": colour} for at, colour in thresholds]}


def _properties(column):
    yield "unit", column.unit
    if column.thresholds:
        yield "thresholds", _steps(column.thresholds)
        yield "color", {"mode": "thresholds"}
        yield "custom.cellOptions", {"type": "color-text"}
    if column.shades:
        yield "color", {"mode": SHADES}
        yield "custom.cellOptions", {"type": "color-text"}
    if column.width:
        yield "custom.width", column.width
    if column.links:
        yield "links", list(column.links)


def _override(name, *properties):
    return {"matcher": {"id": "byName", "options": name}, "properties": [{"id": key, "value": one} for key, one in properties]}


# --- Variables


def variable(name, label, metric, where="", several=False):
    """Values of the label `name` that the metric has."""
    expr = f"label_values({metric}{{{where}}}, {name})"
    body = {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": DATASOURCE,
        "query": {"query": expr, "refId": "PrometheusVariableQueryEditor-VariableQuery"},
        "refresh": 2,  # when the time range changes, too: agents come and go
        "sort": 1,
        "multi": several,
        "includeAll": several,
        "hide": 0,
        "skipUrlSync": False,
        "options": [],
    }
    if several:
        # Also matches series that have no such label.
        body |= {"allValue": ".*", "current": {"selected": True, "text": ["All"], "value": ["$__all"]}}
    return body


DATASOURCE_VARIABLE = {
    "type": "datasource",
    "name": "datasource",
    "label": "Prometheus",
    "query": "prometheus",
    "refresh": 1,
    "multi": False,
    "includeAll": False,
    "hide": 0,
    "skipUrlSync": False,
    "options": [],
}
JOB = variable("job", "Job", "pathmeter_build_info")
ZONE = variable("zone", "Zone", "pathmeter_build_info", 'job="$job"', several=True)
INSTANCE = variable("instance", "Agent", "pathmeter_build_info", 'job="$job",zone=~"$zone"')
FAMILY = {
    "type": "custom",
    "name": "family",
    "label": "Family",
    "query": "ipv4,ipv6",
    "multi": True,
    "includeAll": True,
    "allValue": ".*",
    "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    "hide": 0,
    "skipUrlSync": False,
    "options": [],
}


# --- Annotations


def annotation(name, colour, expr, text):
    """Annotations: events as lines, or as regions while they last, in all graphs of the board."""
    return {
        "name": name,
        "datasource": DATASOURCE,
        "enable": True,
        "hide": False,
        "iconColor": colour,
        "expr": expr,
        "step": SCRAPE_INTERVAL,
        "titleFormat": name,
        "textFormat": text,
        "tagKeys": "",
        "useValueForTime": False,
    }


def events(agents, paths, traces=None):
    """Of the agents and the paths that the board shows. `traces`: the paths of trace probes, if `paths` selects others only."""
    return [
        annotation(
            "Route changed", RED,
            f"sum without (kind) (increase(pathmeter_trace_route_changes_total{{{traces or paths}}}[$__rate_interval])) > 0",
            "{{instance}} → {{peer}}, {{direction}} ({{family}})",
        ),
        annotation(
            "Path MTU changed", ORANGE,
            f"increase(pathmeter_path_mtu_changes_total{{{paths}}}[$__rate_interval]) > 0",
            "{{instance}} → {{peer}} ({{probe}}, {{family}})",
        ),
        annotation(
            "Peer draining", BLUE,
            f"max by (instance, peer) (pathmeter_echo_draining{{{paths}}}) == 1",
            "{{peer}} said goodbye to {{instance}}",
        ),
        annotation(
            "Configuration reloaded", GREEN,
            f"changes(pathmeter_config_last_reload_success_timestamp_seconds{{{agents}}}[$__rate_interval]) > 0",
            "{{instance}}",
        ),
        annotation(
            "Agent restarted", PURPLE,
            # Not by changes(): an agent that was away for longer than the window changed nothing in it.
            f"time() - process_start_time_seconds{{{agents}}} < 60",
            "{{instance}}",
        ),
        annotation(
            "Clock stepped", YELLOW,
            f"max by (instance) (increase(pathmeter_clock_steps_total{{{agents}}}[$__rate_interval])) > 0",
            "{{instance}}",
        ),
    ]  # fmt: skip


# --- The grid: 24 columns; what is on the first screen of 1920 by 1080 has 22 rows.


@dataclass
class Line:
    height: int
    panels: list  # of (width, Panel)


@dataclass
class Details:
    title: str
    lines: list


@dataclass
class Board:
    uid: str
    json: dict
    # (panel's title, letter, Query), also of annotations.
    queries: list


def line(height, *panels):
    return Line(height, panels)


def details(title, *lines):
    """A collapsed row, which sends no queries to Prometheus until it is expanded."""
    return Details(title, lines)


def dashboard(uid, title, question, *, variables, annotations, screen, rows, links=()):
    ids = iter(range(1, 1000))
    asked = []

    def place(lines, top):
        placed = []
        for one in lines:
            left = 0
            for width, panel in one.panels:
                position = {"h": one.height, "w": width, "x": left, "y": top}
                placed.append({"id": next(ids), "gridPos": position, **panel.json})
                asked.extend((panel.json["title"], letter, one_query) for letter, one_query in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", panel.queries, strict=False))
                left += width
            top += one.height
        return placed

    panels = place(screen, 0)
    top = sum(one.height for one in screen)
    for row in rows:
        head = {"id": next(ids), "type": "row", "title": row.title, "collapsed": True, "gridPos": {"h": 1, "w": 24, "x": 0, "y": top}}
        panels.append(head | {"panels": place(row.lines, top + 1)})
        top += 1
    asked.extend((f"annotation: {one['name']}", "Anno", Query(one["expr"], one["textFormat"], TROUBLE)) for one in annotations)

    body = {
        "uid": uid,
        "title": title,
        "description": question,
        "tags": ["pathmeter"],
        "editable": True,
        "graphTooltip": 1,  # one crosshair for all graphs
        "schemaVersion": SCHEMA_VERSION,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [DATASOURCE_VARIABLE, *variables]},
        "annotations": {"list": annotations},
        "links": [_link(*one) for one in _OTHERS if one[1] != uid] + list(links),
        "panels": panels,
    }
    return Board(uid, body, asked)


_OTHERS = [
    ("Fleet", FLEET, "The network between all agents, and where it has problems"),
    ("Pair", PAIR, "The path from one agent to one peer"),
    ("Node", NODE, "Is it this host, its uplink, one path or a peer?"),
    ("Agent", AGENT, "Whether this agent measures reliably"),
]


def _link(title, uid, tooltip):
    return link(title, f"/d/{uid}", tooltip, include_variables=True)


def link(title, url, tooltip, include_variables=False):
    return {
        "type": "link",
        "title": title,
        "url": url,
        "tooltip": tooltip,
        "icon": "dashboard",
        "tags": [],
        "asDropdown": False,
        "includeVars": include_variables,
        "keepTime": True,
        "targetBlank": False,
    }
