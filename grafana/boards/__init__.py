"""The dashboards: one file each, of what kit.py and promql.py offer."""
