"""Building blocks of the queries. Each ratio is defined once, here.

`where` is the inside of a selector's braces, `by` the labels that the result keeps.
"""

# Grafana's: long enough for four scrapes, and for the distance between two points of the graph.
GRAPH = "$__rate_interval"
# The window of the recording rules.
RECORDED = "5m"
# Window of a p99: half of the replies of a path with one datagram per second in it are enough.
LONG = "10m"


def total(metric, where, by="", window=GRAPH):
    """A counter's rate, summed."""
    return f"{_sum(by)}(rate({metric}{{{where}}}[{window}]))"


def network_verdicts(where, by="", window=GRAPH):
    """Datagrams per second for which the network is responsible: neither withdrawn nor dropped by a host."""
    return (
        f"({total('pathmeter_echo_verdicts_total', where, by, window)}"
        f" - {total('pathmeter_echo_withdrawn_total', where, by, window)}"
        f" - {total('pathmeter_echo_host_dropped_total', where, by, window)})"
    )


def loss_by_direction(where, window=GRAPH):
    """Each direction's part of the loss ratio: they add up to it."""
    lost = total("pathmeter_echo_lost_total", where, "direction", window)
    return f"{lost} / on () group_left () ({network_verdicts(where, '', window)} > 0)"


def recorded_loss(where):
    """Loss ratio of the last five minutes, from the recording rules, of many paths together."""
    return f"sum(pathmeter_pair:echo_lost:rate5m{{{where}}}) / (sum(pathmeter_pair:echo_network_verdicts:rate5m{{{where}}}) > 0)"


def recorded_loss_by_direction(where):
    lost = f"sum by (direction) (pathmeter_pair:echo_lost_direction:rate5m{{{where}}})"
    return f"{lost} / on () group_left () (sum(pathmeter_pair:echo_network_verdicts:rate5m{{{where}}}) > 0)"


def worst_loss(where, by="", direction=""):
    """Loss ratio of the last five minutes of the worst probe: the sum of all protocols would hide the one with loss.

    Of probes with thirty datagrams or more in that time, so that chance in one slow probe does not dominate; if there are only slow
    ones, of those.
    """
    paths = ", ".join(filter(None, [by, "probe, family"]))
    if direction:
        lost = f'sum by ({paths}) (pathmeter_pair:echo_lost_direction:rate5m{{{where},direction="{direction}"}})'
    else:
        lost = f"sum by ({paths}) (pathmeter_pair:echo_lost:rate5m{{{where}}})"
    answerable = f"sum by ({paths}) (pathmeter_pair:echo_network_verdicts:rate5m{{{where}}})"
    worst = f"max by ({by})" if by else "max"
    return f"({worst} ({lost} / ({answerable} >= 0.1)) or {worst} ({lost} / ({answerable} > 0)))"


def mean(metric, where, by="", window=GRAPH):
    """Mean of a summary or histogram."""
    return f"{total(metric + '_sum', where, by, window)} / ({total(metric + '_count', where, by, window)} > 0)"


def quantile(q, metric, where, by="", window=GRAPH):
    """Quantile of a histogram, if there are 3 / (1 - q) values: with fewer, all of them lie below the true quantile one time in 20."""
    enough = round(3 / (1 - q))
    keep = ", ".join(filter(None, ["le", by]))
    return (
        f"histogram_quantile({q}, sum by ({keep}) (rate({metric}_bucket{{{where}}}[{window}])))"
        f" and {_sum(by)}(increase({metric}_count{{{where}}}[{window}])) >= {enough}"
    )


def late_wakeups(where, by, window=LONG):
    """Share of a loop's wake-ups that were 10 ms or more late, if there were at least 300.

    No quantile: the histogram has one bucket from 1 to 10 ms, and a p99 would be read off somewhere in it.
    """
    bucket, count = "pathmeter_loop_lag_seconds_bucket", "pathmeter_loop_lag_seconds_count"
    within = where + ',le="0.01"'
    return (
        f"(1 - {total(bucket, within, by, window)} / {total(count, where, by, window)})"
        f" and {_sum(by)}(increase({count}{{{where}}}[{window}])) >= 300"
    )


def buckets(metric, where):
    """For a heatmap: increase of each bucket between two points."""
    return f"sum by (le) (increase({metric}_bucket{{{where}}}[{GRAPH}]))"


def or_zero(query):
    """Replaces the missing value of a count of problems by 0."""
    return f"({query}) or vector(0)"


def _sum(by):
    return f"sum by ({by}) " if by else "sum"
