"""Pictures of the dashboards without a Grafana: a Prometheus is asked, Grafana's UI components draw in a headless browser.

Needs Node (`npm ci && npm run build` in this folder, as `make pictures` does), Chromium, and the extra `test`.
"""
