"""One file per task: data, metric and shortcut baselines."""
