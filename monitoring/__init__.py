"""What is measured and how it is shown: the metric catalogue, exporters, GPU telemetry, dashboards and alert rules.

Stands beside the floors: reads the records of `loopserve.stats`, and is imported by `deploy/` only. Knows nothing about how the
engine works, and nothing here is on the way of a turn: a slow or missing exporter never holds one up.
"""
