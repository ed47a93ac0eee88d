"""Write every dashboard's JSON: `python -m monitoring.dashboards`."""

from monitoring.dashboards import BOARDS, path_of

for board in BOARDS:
    path_of(board).write_text(board.to_json(), encoding="utf-8")
