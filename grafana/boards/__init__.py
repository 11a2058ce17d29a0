"""The dashboards, one file each, built from kit.py and promql.py."""
