#!/usr/bin/python3
"""Checks the rules of deploy/prometheus/rules against their documentation and tests.

    check-rules.py             static checks
    check-rules.py --test      promtool test rules, all files, two at a time
    check-rules.py --mutants   changes each rule in small ways and expects a test to fail; takes half an hour

Each alert needs its annotations, a section in docs/runbooks.md, a comment that begins with PAGE, TICKET or INFO, and tests
in which it fires, does not fire, resolves, and has missing data. Each recording rule needs a test with a value and one
without. A query may name what docs/reference/metrics.md or a recording rule defines, takes rates of counters and of nothing else, and divides
by nothing that may be zero.
"""

import concurrent.futures
import pathlib
import re
import subprocess
import sys
import tempfile

try:
    import yaml
except ImportError:
    sys.exit("error: python3-yaml is missing; install the Debian package")

ROOT = pathlib.Path(__file__).resolve().parent.parent
RULES = ROOT / "deploy/prometheus/rules"

SEVERITIES = {"critical": "PAGE", "warning": "TICKET", "info": "INFO"}
SCOPES = {"pair", "peer", "zone", "agent"}
DASHBOARDS = re.compile(r"/d/pathmeter-(fleet|pair|node|agent)(\?|$)")
ANNOTATIONS = {"summary", "description", "dashboard", "runbook_url"}
# Prefix of the names of tests with missing data.
MISSING = "missing:"

# Functions of ranges, by the kind of metric that they accept.
OF_COUNTERS = {"rate", "increase", "irate", "resets"}
# Functions that do not use the value of a counter.
COUNTING = {"count", "group", "absent"}
KEYWORDS = {
    "by", "without", "on", "ignoring", "group_left", "group_right", "bool", "offset", "and", "or", "unless", "inf", "nan",
}
GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
# Labels added by a scrape.
TARGET_LABELS = {"job", "instance", "zone", "le", "__name__"}
TOKEN = re.compile(
    r"""(?P<space>\s+|\#[^\n]*)|(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
    r"""|(?P<duration>\d+(?:ms|[smhdwy])(?:\d+(?:ms|[smhdwy]))*)|(?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)"""
    r"""|(?P<name>[A-Za-z_:][A-Za-z0-9_:]*)|(?P<mark>=~|!~|!=|==|>=|<=|[-+*/%^<>=(){}\[\],@])"""
)


class Rule:
    """An alert or recording rule, with its file and line."""

    def __init__(self, file, entry, text):
        self.file = file
        self.entry = entry
        self.kind = "alert" if "alert" in entry else "record"
        self.name = entry[self.kind]
        self.expr = str(entry["expr"])
        self.comment = comment_above(text, f"- {self.kind}: {self.name}")


def comment_above(text, line):
    lines = text.splitlines()
    at = next(number for number, found in enumerate(lines) if found.strip() == line)
    comment = []
    while at > 0 and lines[at - 1].strip().startswith("#"):
        at -= 1
        comment.insert(0, lines[at].strip().lstrip("# "))
    return " ".join(comment)


def load_rules():
    rules = []
    for path in sorted(RULES.glob("*.rules.yaml")):
        text = path.read_text()
        for group in yaml.safe_load(text)["groups"]:
            rules += [Rule(path.name, entry, text) for entry in group["rules"]]
    return rules


def load_tests():
    """All tests, with their files."""
    tests = []
    for path in sorted(RULES.glob("*.test.yaml")):
        whole = yaml.safe_load(path.read_text())
        tests += [(path.name, whole, test) for test in whole["tests"]]
    return tests


def documented():
    """Type and labels of each metric family in docs/reference/metrics.md."""
    families = {}
    for line in (ROOT / "docs/reference/metrics.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| `") or len(cells) < 4 or cells[1] not in ("counter", "gauge", "histogram", "summary"):
            continue
        labels = set(re.findall(r"[a-z_]+", cells[2]))
        if "path" in labels:
            labels |= {"probe", "peer", "family"}
        families[cells[0].strip("`")] = (cells[1], labels)
    # Metrics of Prometheus itself.
    families["up"] = ("gauge", set())
    return families


def series(families):
    """Kind (counter, gauge or bucket) and labels of all series that a query can use."""
    known = {}
    for name, (kind, labels) in families.items():
        if kind in ("histogram", "summary"):
            known |= {name + "_sum": ("counter", labels), name + "_count": ("counter", labels)}
            if kind == "histogram":
                known[name + "_bucket"] = ("bucket", labels)
        else:
            known[name] = (kind, labels)
    return known


def seconds(eval_time):
    units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800, "y": 31536000}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)(ms|[smhdwy])", str(eval_time)))


def tokens(expr):
    at, found = 0, []
    while at < len(expr):
        match = TOKEN.match(expr, at)
        if not match:
            raise ValueError(f"cannot read {expr[at:at + 20]!r}")
        if match.lastgroup != "space":
            found.append((match.lastgroup, match.group()))
        at = match.end()
    return found


def close(found, at):
    """The index after the bracket that closes the one at an index."""
    pairs = {"(": ")", "{": "}", "[": "]"}
    ends = [pairs[found[at][1]]]
    at += 1
    while ends:
        if found[at][0] == "mark":
            if found[at][1] in pairs:
                ends.append(pairs[found[at][1]])
            elif found[at][1] == ends[-1]:
                ends.pop()
        at += 1
    return at


def query_problems(expr, known, recorded):
    """Problems of a query that can be found in its text."""
    found = tokens(expr)
    problems = []
    # Functions and aggregations around the current token, with the index at which each ends.
    around = []
    at = 0
    while at < len(found):
        kind, text = found[at]
        around = [(name, end) for name, end in around if at < end]
        following = found[at + 1][1] if at + 1 < len(found) else ""
        if kind == "mark" and text == "/":
            problems += divisor_problems(found, at + 1)
        if kind != "name":
            at += 1
            continue
        if text in GROUPING:
            at = close(found, at + 1) if following == "(" else at + 1
        elif text in KEYWORDS:
            at += 1
        elif following == "(":
            end = close(found, at + 1)
            around.append((text, end))
            if text == "histogram_quantile":
                inner = " ".join(token for _, token in found[at:end])
                if not re.search(r"\brate \( \S+_bucket\b|_bucket:rate", inner):
                    problems.append("histogram_quantile of something that is not a rate of buckets")
            at += 1
        elif following in GROUPING:
            # sum by (…) (…): the name of the function precedes its labels.
            end = close(found, at + 2)
            if end < len(found) and found[end][1] == "(":
                around.append((text, close(found, end)))
            at += 1
        else:
            inside = [name for name, _ in around]
            at += 1
            matchers = []
            if at < len(found) and found[at][1] == "{":
                end = close(found, at)
                matchers = [found[i][1] for i in range(at, end) if found[i][0] == "name"]
                at = end
            is_range = at < len(found) and found[at][1] == "["
            problems += use_problems(text, inside, is_range, matchers, known, recorded)
    return problems


def use_problems(name, inside, is_range, matchers, known, recorded):
    if name in recorded:
        if is_range and inside[-1] in OF_COUNTERS:
            return [f"{inside[-1]}() of {name}, which is recorded and no counter"]
        return []
    if name not in known:
        return [f"{name} is in neither docs/reference/metrics.md nor a recording rule"]
    kind, labels = known[name]
    strange = set(matchers) - TARGET_LABELS - (labels if labels is not None else set(matchers))
    problems = [f"{name} has no label {label}" for label in sorted(strange)]
    is_counter = kind in ("counter", "bucket")
    if is_range and is_counter and inside[-1] not in OF_COUNTERS:
        problems.append(f"{inside[-1]}() of the counter {name}")
    elif is_range and not is_counter and inside[-1] in OF_COUNTERS:
        problems.append(f"{inside[-1]}() of the gauge {name}")
    elif not is_range and is_counter and not COUNTING & set(inside):
        problems.append(f"the counter {name} without a rate")
    return problems


def divisor_problems(found, at):
    """A divisor must be a number, or have a guard: `> 0`, or an addition that is not zero."""
    while found[at][1] in GROUPING:
        at = close(found, at + 1)
    if found[at][0] == "number":
        return []
    if found[at][1] == "(":
        inner = " ".join(token for _, token in found[at:close(found, at)])
        if re.search(r"(> 0|>= [1-9]\d*) \)$", inner) or re.search(r"\+ [0-9.]+ \)$", inner):
            return []
    return ["divides by what may be 0: write (… > 0)"]


def alert_problems(rule, tests, sections):
    entry = rule.entry
    labels, annotations = entry.get("labels", {}), entry.get("annotations", {})
    anchor = rule.name.lower()
    if not rule.name.startswith("Pathmeter"):
        yield "its name does not begin with Pathmeter"
    if labels.get("severity") not in SEVERITIES:
        yield "its severity is not one of  " + ", ".join(SEVERITIES)
    elif not rule.comment.startswith(SEVERITIES[labels["severity"]]):
        yield f"the comment above it does not begin with {SEVERITIES[labels['severity']]}"
    if labels.get("scope") not in SCOPES:
        yield "its scope is not one of  " + ", ".join(sorted(SCOPES))
    for missing in sorted(ANNOTATIONS - {name for name, text in annotations.items() if text}):
        yield f"it has no annotation {missing}"
    if not DASHBOARDS.match(annotations.get("dashboard", "")):
        yield "its dashboard is not one of grafana/dashboards"
    if annotations.get("runbook_url") != f"docs/runbooks.md#{anchor}":
        yield f"its runbook_url is not docs/runbooks.md#{anchor}"
    if rule.name not in sections:
        yield "docs/runbooks.md has no section of its name"

    fires = is_silent = stops = is_missing = False
    for _, _, test in tests:
        cases = [case for case in test.get("alert_rule_test", []) if case["alertname"] == rule.name]
        cases.sort(key=lambda case: seconds(case["eval_time"]))
        fired = [bool(case.get("exp_alerts")) for case in cases]
        fires |= any(fired)
        is_silent |= not all(fired)
        stops |= any(fired[i] and not all(fired[i:]) for i in range(len(fired)))
        is_missing |= bool(cases) and test["name"].startswith(MISSING)
    if not fires:
        yield "no test expects it to fire"
    if not is_silent:
        yield "no test expects it not to fire"
    if not stops:
        yield "no test expects it to resolve"
    if not is_missing:
        yield f"no test whose name begins with {MISSING} uses it"


def record_problems(rule, tests):
    has_value = has_none = False
    for _, _, test in tests:
        for case in test.get("promql_expr_test", []):
            if rule.name in [text for _, text in tokens(case["expr"])]:
                has_value |= bool(case.get("exp_samples"))
                has_none |= not case.get("exp_samples")
    if not has_value:
        yield "no test expects a value of it"
    if not has_none:
        yield "no test expects it to have none"


def check():
    rules, tests = load_rules(), load_tests()
    known = series(documented())
    recorded = {rule.name for rule in rules if rule.kind == "record"}
    runbooks = (ROOT / "docs/runbooks.md").read_text()
    sections = set(re.findall(r"^## (Pathmeter\w+)$", runbooks, re.MULTILINE))
    problems = []
    for rule in rules:
        found = query_problems(rule.expr, known, recorded)
        found += alert_problems(rule, tests, sections) if rule.kind == "alert" else record_problems(rule, tests)
        problems += [f"{rule.file}: {rule.name}: {problem}" for problem in found]
    alerts = [rule.name for rule in rules if rule.kind == "alert"]
    problems += [f"docs/runbooks.md: {name} is not an alert" for name in sorted(sections - set(alerts))]
    problems += [f"{name} is defined more than once" for name in sorted(set(alerts)) if alerts.count(name) > 1]
    for name, whole, test in tests:
        used = {case["alertname"] for case in test.get("alert_rule_test", [])}
        problems += [f"{name}: {test['name']}: {alert} is not an alert" for alert in sorted(used - set(alerts))]
    if problems:
        sys.exit("\n".join(problems) + f"\nerror: {len(problems)} problems with the rules")
    print(f"{len(alerts)} alerts and {len(recorded)} recording rules are documented and tested")


def run_tests(path):
    ended = subprocess.run(["promtool", "test", "rules", path.name], cwd=path.parent, capture_output=True, text=True)
    return ended.returncode == 0, ended.stdout + ended.stderr


def test():
    paths = sorted(RULES.glob("*.test.yaml"), key=lambda path: -path.stat().st_size)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run_tests, paths))
    for passed, output in results:
        if not passed:
            print(output, file=sys.stderr)
    if not all(passed for passed, _ in results):
        sys.exit("error: tests of rules failed")
    print(f"{sum(len(yaml.safe_load(path.read_text())['tests']) for path in paths)} tests of rules passed")


def mutants(rule):
    """Copies of the rule with one change: disabled, another duration, number, comparison or condition."""
    expr = rule.expr

    def changed(what, new, **more):
        return what, {**rule.entry, "expr": new, **more}

    yield changed("never", f"({expr}) and on () vector(0) > 1")
    if "for" in rule.entry:
        yield changed("no for", expr, **{"for": "0s"})
        yield changed("for 1d", expr, **{"for": "1d"})
    if rule.kind == "alert":
        for label in rule.entry["labels"]:
            labels = {name: text for name, text in rule.entry["labels"].items() if name != label}
            yield changed(f"no label {label}", expr, labels=labels)
    for match in TOKEN.finditer(expr):
        kind, text = match.lastgroup, match.group()
        before, after = expr[: match.start()], expr[match.end() :]
        where = f"at {match.start()}"
        if kind == "number" and float(text) != 0:
            yield changed(f"{text} * 1.5 {where}", f"{before}{float(text) * 1.5}{after}")
            yield changed(f"{text} / 1.5 {where}", f"{before}{float(text) / 1.5}{after}")
        elif kind == "duration":
            longer = f"{int(seconds(text) * 2)}s"
            yield changed(f"{text} * 2 {where}", f"{before}{longer}{after}")
        elif text in (">", "<", ">=", "<=", "=="):
            turned = {">": "<", "<": ">", ">=": "<", "<=": ">", "==": "!="}[text]
            yield changed(f"{text} turned {where}", f"{before}{turned}{after}")
        elif text == "unless":
            yield changed(f"unless is and {where}", f"{before}and{after}")
        elif text in ("and", "or"):
            yield changed(f"{text} turned {where}", f"{before}{'or' if text == 'and' else 'and'}{after}")


def is_noticed(rule, entry, tests):
    """Whether a test that uses the rule, directly or through other rules, fails with the changed rule."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for path in RULES.glob("*.rules.yaml"):
            whole = yaml.safe_load(path.read_text())
            for group in whole["groups"]:
                group["rules"] = [entry if found == rule.entry else found for found in group["rules"]]
            (folder / path.name).write_text(yaml.safe_dump(whole))
        used = {rule.name}
        for _ in range(4):
            used |= {other.name for other in load_rules() if any(name in other.expr for name in used)}
        for number, (_, whole, test) in enumerate(tests):
            text = yaml.safe_dump(test)
            if rule.file in whole["rule_files"] and any(name in text for name in used):
                path = folder / f"{number}.test.yaml"
                path.write_text(yaml.safe_dump({**whole, "tests": [test]}))
                if not run_tests(path)[0]:
                    return True
    return False


def mutate(only):
    tests = load_tests()
    # The cheapest tests first.
    tests.sort(key=lambda test: len(yaml.safe_dump(test[2])))
    work = [
        (rule, what, entry)
        for rule in load_rules()
        if not only or rule.name in only
        for what, entry in mutants(rule)
    ]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        noticed = list(pool.map(lambda one: is_noticed(one[0], one[2], tests), work))
    for (rule, what, _), is_seen in zip(work, noticed):
        if not is_seen:
            print(f"{rule.file}: {rule.name}: {what}: no test fails")
    print(f"{sum(noticed)} of {len(work)} changes are detected")


if __name__ == "__main__":
    if sys.argv[1:] == ["--test"]:
        test()
    elif sys.argv[1:2] == ["--mutants"]:
        mutate(set(sys.argv[2:]))
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        check()
