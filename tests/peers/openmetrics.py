"""Scrapes a page as OpenMetrics with gzip, and parses it with the reference parser. Prints the result as JSON."""

import gzip
import json
import sys
import urllib.request

from prometheus_client.openmetrics.parser import text_string_to_metric_families

request = urllib.request.Request(sys.argv[1], headers={
    "Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5",
    "Accept-Encoding": "gzip",
})
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
with opener.open(request, timeout=20) as answer:
    kind, encoding, packed = answer.headers["Content-Type"], answer.headers["Content-Encoding"], answer.read()
families = list(text_string_to_metric_families(gzip.decompress(packed).decode()))
print(json.dumps({
    "type": kind,
    "encoding": encoding,
    "families": {family.name: family.type for family in families},
    "samples": sum(len(family.samples) for family in families),
}))
